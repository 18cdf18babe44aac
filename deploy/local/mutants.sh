#!/usr/bin/env bash
# Mutation tests of the protocol's decisions: mutants.sh [ARGUMENT…], with arguments of `cargo mutants`, such as
# `--shard 0/4` or `--file protocol/src/lease.rs`. deploy/mutants.toml has the files, and the changes that no test
# can notice. Fails if another change is not noticed. The results are in target/mutants/mutants.out.
set -euo pipefail
cd "$(dirname "$0")/../.."
. deploy/local/lib.sh
version=27.1.0
tool=${MAYFLY_CACHE:-/var/cache/mayfly}/cargo/cargo-mutants-$version/bin
if [ ! -x "$tool/cargo-mutants" ]; then
  say "building cargo-mutants …"
  cargo install --quiet --locked --root "${tool%/bin}" "cargo-mutants@$version"
fi
mkdir -p target/mutants
# The copies of the tree share what they build of the dependencies.
PATH=$tool:$PATH CARGO_TARGET_DIR=$PWD/target/mutants/build \
  cargo mutants --config deploy/mutants.toml --package mayfly-protocol --output target/mutants "$@"
