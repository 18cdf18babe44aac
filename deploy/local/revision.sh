#!/usr/bin/env bash
# Builds the programs of another revision: revision.sh REVISION DIR. They end up in DIR/bin.
set -euo pipefail
cd "$(dirname "$0")/../.."
revision=$(git rev-parse --verify --quiet "$1^{commit}") || {
  echo "no such revision: $1" >&2
  exit 2
}
mkdir -p "$2"
dir=$(cd "$2" && pwd)
[ "$(cat "$dir/revision" 2>/dev/null)" = "$revision" ] && exit 0
rm -rf "$dir/source" "$dir/bin" "$dir/revision"
mkdir "$dir/source" "$dir/bin"
git archive "$revision" | tar -x -C "$dir/source"
(cd "$dir/source" && CARGO_TARGET_DIR="$dir/build" "${CARGO:-cargo}" build --workspace --bins --locked)
cp "$dir"/build/debug/mayfly{,-dispatcher,-engine} "$dir/bin/"
rm -rf "$dir/source"
echo "$revision" >"$dir/revision"
