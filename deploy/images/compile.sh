#!/usr/bin/env bash
# Builds the programs as they are released, static and without debug information, and puts them into a
# directory: compile.sh DIR
# The same source and compiler make the same bytes in every directory: the programs contain no path of this machine.
# With MAYFLY_IMAGES=debug the programs are those of `make build`, linked statically. Tests use them, because the
# libraries are built already.
set -euo pipefail
mkdir -p "${1:?a directory}"
to=$(cd "$1" && pwd)
cd "$(dirname "$0")/../.."
programs=(mayfly-dispatcher mayfly-engine mayfly)
case ${MAYFLY_IMAGES:-} in
  '' | debug) ;;
  *) echo "MAYFLY_IMAGES: debug, or nothing" >&2; exit 1 ;;
esac
if [ "${MAYFLY_IMAGES:-}" = debug ]; then
  RUSTC_WORKSPACE_WRAPPER=$PWD/deploy/images/static.sh cargo build --locked --workspace --bins
  for program in "${programs[@]}"; do
    install -m 755 "${CARGO_TARGET_DIR:-target}/debug/$program" "$to/$program"
  done
  exit
fi
# glibc's own resolver works in a static program; a target given by name keeps build scripts dynamic.
host=$(rustc -vV | sed -n 's/^host: //p')
target=${CARGO_TARGET_DIR:-$PWD/target}/images
registry=${CARGO_HOME:-$HOME/.cargo}
# The last prefix that matches counts.
flags=(-C target-feature=+crt-static -C strip=symbols --remap-path-prefix="$PWD=/source"
  --remap-path-prefix="$target=/source/target" --remap-path-prefix="$registry=/cargo")
# A path may hold a space: each flag ends with this character.
CARGO_ENCODED_RUSTFLAGS=$(printf '\x1f%s' "${flags[@]}")
export CARGO_ENCODED_RUSTFLAGS=${CARGO_ENCODED_RUSTFLAGS:1}
export CFLAGS="-ffile-prefix-map=$PWD=/source -ffile-prefix-map=$target=/source/target -ffile-prefix-map=$registry=/cargo"
cargo build --release --locked --workspace --bins --target "$host" --target-dir "$target"
for program in "${programs[@]}"; do
  install -m 755 "$target/$host/release/$program" "$to/$program"
done
