#!/usr/bin/env bash
# Downloads the drivers and pools of docs/applications.md into a directory, and prints its path: for Python from PyPI,
# for Node from npm, in the versions and with the sums that are written in drivers/.
set -euo pipefail
cd "$(dirname "$0")/../.."
. deploy/local/lib.sh
locks=$PWD/tests/documents/drivers
# Another set of versions goes into another directory.
set=$(cat "$locks"/requirements.txt "$locks"/package-lock.json | sha256sum | head -c 12)
dir=${MAYFLY_CACHE:-/var/cache/mayfly}/drivers-$set
if [ ! -e "$dir/complete" ]; then
  # helm/tools.sh installs node, npm and venv, if they are missing.
  helm/tools.sh >/dev/null
  mkdir -p "$dir"
  # Several tests may ask at a time.
  exec 9>"$dir.lock"
  flock 9
  if [ ! -e "$dir/complete" ]; then
    say "fetching drivers of PostgreSQL …"
    rm -rf "${dir:?}"/*
    python3 -m venv "$dir/venv"
    "$dir/venv/bin/pip" install -q --no-deps --only-binary=:all: --require-hashes -r "$locks/requirements.txt" >&2
    cp "$locks"/package.json "$locks"/package-lock.json "$dir/"
    (cd "$dir" && npm ci --silent --no-audit --no-fund >&2)
    touch "$dir/complete"
  fi
fi
echo "$dir"
