#!/usr/bin/env bash
# Mutation tests of the protocol's decisions: mutants.sh [ARGUMENT…], with arguments of `cargo mutants`, such as
# `--shard 0/4` or `--re src/lease`. deploy/mutants.toml has the files, and the changes that no test
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
# Each copy of the tree has the same dependencies, which are built once. Without debug information a build is faster.
PATH=$tool:$PATH CARGO_TARGET_DIR=$PWD/target/mutants/build CARGO_PROFILE_DEV_DEBUG=0 CARGO_PROFILE_TEST_DEBUG=0 \
  cargo mutants --config deploy/mutants.toml --package mayfly-protocol --output target/mutants "$@"
