# What one does with Mayfly. `make` alone lists it.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup setup-test build demo up down test unit store model e2e fmt lint doc bench clean

CARGO ?= cargo
# make e2e TEST=word: only the tests whose name contains it.
TEST ?=
LOCAL := deploy/local

help: ## this list
	@awk -F':.*## ' '/^[a-z0-9-]+:.*## /{printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup:
	@$(LOCAL)/install.sh

setup-test:
	@$(LOCAL)/install.sh --with-pg18

build: setup ## dispatcher, engine and command line, into target/debug
	@$(CARGO) build --workspace --bins --locked

demo: ## the main job, shown on private servers
	@$(LOCAL)/demo.sh

up: ## the same system, left running
	@$(LOCAL)/up.sh

down: ## end what `make up` started
	@$(LOCAL)/down.sh

test: unit store e2e ## all tests

unit: setup-test ## tests that need no servers
	@$(CARGO) test --workspace --exclude mayfly-tests --locked

model: setup-test ## the lease protocol with one more fault in every case: minutes, gigabytes
	@MAYFLY_MODEL_FAULTS=1 $(CARGO) test -p mayfly-model --locked -- --nocapture --test-threads=1 well

e2e: setup-test ## end to end, on private RabbitMQ and PostgreSQL
	@$(CARGO) build --workspace --bins --tests --locked
	@$(LOCAL)/with-servers.sh --pg18 $(CARGO) test -p mayfly-tests --locked --test it -- --test-threads=6 $(TEST)

store: setup-test ## tests of the lease store, in PostgreSQL
	@$(LOCAL)/with-servers.sh $(CARGO) test -p mayfly-dispatcher --locked store::

fmt: ## format the code
	@$(CARGO) fmt

lint: setup ## formatting and clippy, without a warning
	@$(CARGO) fmt --check
	@$(CARGO) clippy --workspace --all-targets --locked -- -D warnings

doc: setup ## rustdoc, without a warning
	@RUSTDOCFLAGS="-D warnings" $(CARGO) doc --workspace --no-deps --locked

bench: setup-test ## figures, on a release build
	@$(CARGO) build --release --workspace --bins --benches --locked
	@$(LOCAL)/with-servers.sh --pg18 $(CARGO) bench -p mayfly-tests --locked --bench issue

clean: ## what was built
	@$(CARGO) clean
