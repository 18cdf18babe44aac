#!/usr/bin/env bash
# Builds the programs of the images, static and without debug information, and puts them into a
# directory: compile.sh DIR
set -euo pipefail
mkdir -p "${1:?a directory}"
to=$(cd "$1" && pwd)
cd "$(dirname "$0")/../.."
# glibc's own resolver works in a static program; a target given by name keeps build scripts dynamic.
host=$(rustc -vV | sed -n 's/^host: //p')
target=${CARGO_TARGET_DIR:-target}/images
RUSTFLAGS="-C target-feature=+crt-static -C strip=symbols" \
  cargo build --release --locked --workspace --bins --target "$host" --target-dir "$target"
for program in mayfly-dispatcher mayfly-engine mayfly; do
  install -m 755 "$target/$host/release/$program" "$to/$program"
done
