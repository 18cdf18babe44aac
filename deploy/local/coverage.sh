#!/usr/bin/env bash
# Measures which lines the tests run: coverage.sh COMMAND… It runs the command, an instance of make, with programs
# that count, prints a table of the crates, and writes all files as HTML into target/coverage/html.
# It needs cargo-llvm-cov and the llvm-tools of rustup, and installs what is missing.
set -euo pipefail
cd "$(dirname "$0")/../.."
. deploy/local/lib.sh
version=0.9.1
tool=${MAYFLY_CACHE:-/var/cache/mayfly}/cargo/cargo-llvm-cov-$version/bin
if [ ! -x "$tool/cargo-llvm-cov" ]; then
  say "building cargo-llvm-cov …"
  cargo install --quiet --locked --root "${tool%/bin}" "cargo-llvm-cov@$version"
fi
rustup component add llvm-tools 2>/dev/null
export PATH=$tool:$PATH CARGO_TARGET_DIR=$PWD/target/coverage/build
# The programs of the end-to-end tests are other processes. A process that is killed writes no counts.
source <(cargo llvm-cov show-env --sh)
cargo llvm-cov clean --workspace
"$@"
cargo llvm-cov report --html --output-dir target/coverage
cargo llvm-cov report --json --summary-only --output-path target/coverage/summary.json
python3 - target/coverage/summary.json "$PWD" <<'PY'
import json, sys
path, root = sys.argv[1:]
sums = {}
for file in json.load(open(path))["data"][0]["files"]:
    crate = file["filename"].removeprefix(root + "/").split("/")[0]
    for key in (crate, "all"):
        lines = sums.setdefault(key, [0, 0])
        lines[0] += file["summary"]["lines"]["covered"]
        lines[1] += file["summary"]["lines"]["count"]
for crate, (covered, count) in sums.items():
    if crate != "all":
        print(f"{crate:12} {covered:6} of {count:6} lines  {100 * covered / count:5.1f} %")
covered, count = sums["all"]
print(f"{'all':12} {covered:6} of {count:6} lines  {100 * covered / count:5.1f} %")
PY
