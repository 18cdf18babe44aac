# The tasks of this repository. `make` without a target lists them.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup setup-test build demo up down check test unit store model mutants coverage e2e chaos-short chaos skew test-chart test-docs test-peers images test-images dist test-dist deny fmt lint doc bench flame clean

CARGO ?= cargo
# make e2e TIER=fast: only that tier (fast, matrix or slow). TEST=word: only the tests whose name contains it;
# with a tier, those of the tier whose name begins with it: TIER=slow TEST=levels.
TIER ?=
TEST ?=
# End-to-end tests that run at a time. They wait more than they work: 12 fill two cores, and leave no time to spare.
THREADS ?= 9
TIERS := fast matrix slow
ifneq ($(filter-out $(TIERS),$(TIER)),)
$(error TIER: one of $(TIERS))
endif
LOCAL := deploy/local
# The steps at which tests can stop a process. A build for use has none.
FAULTS := mayfly-engine/fault-points,mayfly-dispatcher/fault-points
# All tests have the same features. Otherwise cargo would build the dependencies again for each.
TESTS := $(CARGO) test --workspace --locked --features $(FAULTS)
# make deny CHECKS="advisories …": also checks known vulnerabilities, if their list can be fetched.
CHECKS ?= licenses bans sources
# make bench ROW=issue,due: only these groups of rows (tests/bench/rows/mod.rs). FULL=1: the large rows too.
# REPEATS=3, TIME=3 (seconds of a sample), SCALE=0.1 (of the numbers of accounts).
ROW ?=
FULL ?=
REPEATS ?=
TIME ?=
SCALE ?=
# make mutants MUTANTS="--shard 0/4": arguments of cargo mutants.
MUTANTS ?=
# make coverage COVER="unit e2e TIER=fast": also what the fast end-to-end tests run.
COVER ?= unit
# make chaos SCENARIO=word: only the scenarios whose name begins with the word.
SCENARIO ?=

help: ## print this list
	@awk -F':.*## ' '/^[a-z0-9-]+:.*## /{printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup:
	@$(LOCAL)/install.sh

setup-test:
	@$(LOCAL)/install.sh --for-tests

build: setup ## build dispatcher, engine and command line, into target/debug
	@$(CARGO) build --workspace --bins --locked

demo: ## show the main job on private servers
	@$(LOCAL)/demo.sh

up: ## start the same system and leave it running
	@$(LOCAL)/up.sh

down: ## stop what `make up` has started
	@$(LOCAL)/down.sh

check: lint unit ## the daily loop: lint, unit tests, the fast end-to-end tests
	@$(MAKE) --no-print-directory e2e TIER=fast

test: unit store e2e chaos-short ## all tests

unit: setup-test ## the tests that need no servers
	@$(TESTS) --lib --bins --test protocol

model: setup-test ## explore the lease protocol with one more fault in every case (minutes, gigabytes)
	@MAYFLY_MODEL_FAULTS=1 $(TESTS) --test protocol -- --nocapture --test-threads=1 well

mutants: setup ## change the protocol one expression at a time: a unit test must notice (MUTANTS="--shard 0/4")
	@$(LOCAL)/mutants.sh $(MUTANTS)

coverage: setup-test ## the share of lines that the unit tests run (COVER="unit e2e TIER=fast")
	@$(LOCAL)/coverage.sh make --no-print-directory $(COVER)

e2e: setup-test ## end-to-end tests, on private RabbitMQ and PostgreSQL (TIER=fast, matrix or slow; TEST=word)
	@$(CARGO) build --workspace --bins --tests --locked --features $(FAULTS)
	@$(if $(filter fast matrix,$(TIER)),,tests/documents/drivers.sh >/dev/null)
	@$(LOCAL)/with-servers.sh --pg18 $(LOCAL)/suite.sh $(TESTS) --test it -- --test-threads=$(THREADS) --skip chaos:: --skip skew:: --skip peers:: $(addsuffix ::,$(TIER))$(TEST)

chaos-short: setup-test ## the fault suite, about two minutes
	@$(CARGO) build --workspace --bins --tests --locked --features $(FAULTS)
	@$(LOCAL)/with-servers.sh $(TESTS) --test it -- --nocapture short_chaos

chaos: setup-test ## three fault suites of ten minutes, and outages with their figures (SCENARIO=outage, CHAOS_SEED=n)
	@$(CARGO) build --workspace --bins --tests --locked --features $(FAULTS)
	@$(LOCAL)/with-servers.sh $(TESTS) --test it -- --nocapture --test-threads=1 --skip short_chaos chaos::$(SCENARIO)

skew: setup-test ## run programs of another revision with these (REV=commit; default: the last tag, or 12 h ago)
	@$(CARGO) build --workspace --bins --tests --locked --features $(FAULTS)
	@$(LOCAL)/revision.sh "$(REV)" target/skew
	@MAYFLY_OTHER_PROGRAMS=$(CURDIR)/target/skew/bin $(LOCAL)/with-servers.sh $(TESTS) --test it -- skew::

test-peers: setup-test ## run the own tests of psycopg2 and pg8000 at a server and through `mayfly proxy`
	@$(CARGO) build --workspace --bins --tests --locked --features $(FAULTS)
	@$(LOCAL)/with-servers.sh $(TESTS) --test it -- --nocapture peers::

test-chart: setup-test ## test the Helm chart: Helm 3 and 4, schemas, promtool (MAYFLY_WRITE=1 writes its README)
	@tools=$$(helm/tools.sh) && "$$tools/venv/bin/python" helm/check.py "$$tools"

test-docs: setup-test ## run every command block of the documents unchanged (DOCUMENT=word)
	@$(CARGO) build --workspace --bins --tests --locked --features $(FAULTS)
	@tests/documents/languages.sh
	@tests/documents/test.sh "$$(helm/tools.sh)" "$$(tests/documents/drivers.sh)"

images: setup ## build images of the programs as OCI layouts, into target/images/oci
	@deploy/images/build.sh target/images/oci

test-images: images ## test the images' programs as in a container (MAYFLY_IMAGES=debug: those of a debug build)
	@$(LOCAL)/with-servers.sh deploy/images/test.sh target/images/oci

dist: setup ## build a release into target/dist: programs, packages, chart, images, SBOMs, sums
	@deploy/dist/build.sh target/dist

test-dist: setup-test dist ## test a release: a second build has the same sums, packages install, contents are right
	@deploy/dist/test.sh target/dist

deny: setup-test ## check licences, versions and sources of the dependencies, and that each is used
	@$(LOCAL)/deny.sh $(CHECKS)

store: setup-test ## the tests of the lease store, in PostgreSQL
	@$(LOCAL)/with-servers.sh $(TESTS) --lib store::

fmt: ## format the code
	@$(CARGO) fmt

lint: setup ## formatting, words and clippy, without a warning
	@$(CARGO) fmt --check
	@python3 deploy/lint/check.py
	@$(CARGO) clippy --workspace --all-targets --locked -- -D warnings
	@$(CARGO) check --quiet -p mayfly-common --no-default-features --locked

doc: setup ## rustdoc, without a warning
	@RUSTDOCFLAGS="-D warnings" $(CARGO) doc --workspace --no-deps --locked

bench: setup-test ## figures of a release build beside pgbench and OpenBao (ROW=issue,due; FULL=1; MAYFLY_WRITE=1)
	@$(CARGO) build --release --workspace --bins --examples --bench figures --locked
	@BENCH_ROW="$(ROW)" BENCH_FULL="$(FULL)" BENCH_REPEATS="$(REPEATS)" BENCH_SECONDS="$(TIME)" BENCH_SCALE="$(SCALE)" \
	  $(LOCAL)/bench.sh target/bench $(CARGO) bench -q --workspace --locked --bench figures

flame: setup-test ## flame graphs of dispatcher and engines while they issue, into target/flame (MAYFLY_WRITE=1: into docs)
	@$(CARGO) build --release --workspace --bins --bench figures --locked
	@$(LOCAL)/flame.sh target/flame $(CARGO) bench -q --workspace --locked --bench figures

clean: ## delete what was built
	@$(CARGO) clean
