#!/usr/bin/env bash
# Builds the programs of another revision: revision.sh REVISION DIR. They end up in DIR/bin. Without a
# name it is the last tag, or else the last revision that is half a day older than this one.
set -euo pipefail
cd "$(dirname "$0")/../.."
name=${1:-$(git describe --tags --abbrev=0 2>/dev/null || true)}
[ -n "$name" ] || name=$(git rev-list -1 --before="$(($(git log -1 --format=%ct) - 43200))" HEAD)
[ -n "$name" ] || name=$(git rev-list --max-parents=0 HEAD | tail -n 1)
revision=$(git rev-parse --verify --quiet "$name^{commit}") || {
  echo "no such revision: $name" >&2
  exit 2
}
mkdir -p "$2"
dir=$(cd "$2" && pwd)
[ "$(cat "$dir/revision" 2>/dev/null)" = "$revision" ] && exit 0
rm -rf "$dir/source" "$dir/bin" "$dir/revision"
mkdir "$dir/source" "$dir/bin"
# Most of what is built is the same as for this one.
built=${CARGO_TARGET_DIR:-target}/debug
if [ -d "$built/deps" ] && [ ! -d "$dir/build" ]; then
  mkdir -p "$dir/build/debug"
  cp -a "$built/deps" "$built/build" "$built/.fingerprint" "$dir/build/debug/"
fi
git archive "$revision" | tar -x -C "$dir/source"
(cd "$dir/source" && CARGO_TARGET_DIR="$dir/build" "${CARGO:-cargo}" build --workspace --bins --locked)
cp "$dir"/build/debug/mayfly{,-dispatcher,-engine} "$dir/bin/"
rm -rf "$dir/source" "$dir/build"
echo "$revision" >"$dir/revision"
