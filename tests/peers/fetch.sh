#!/usr/bin/env bash
# Downloads the sources of two drivers with their own tests, and what these need, from PyPI into a directory, and
# prints its path. Versions and sums are written in the files beside this one.
set -euo pipefail
cd "$(dirname "$0")/../.."
. deploy/local/lib.sh
here=$PWD/tests/peers
set=$(cat "$here"/*.txt "$here/fetch.sh" | sha256sum | head -c 12)
dir=${MAYFLY_CACHE:-/var/cache/mayfly}/peers-$set
if [ ! -e "$dir/complete" ]; then
  # helm/tools.sh installs venv, if it is missing.
  helm/tools.sh >/dev/null
  say "fetching the tests of drivers …"
  mkdir -p "$dir"
  rm -rf "${dir:?}"/*
  python3 -m venv "$dir/venv"
  "$dir/venv/bin/pip" install -q --no-deps --only-binary=:all: --require-hashes -r "$here/requirements.txt" >&2
  # pip reads the metadata of a source, for which psycopg2 asks pg_config.
  PATH=/usr/lib/postgresql/15/bin:$PATH "$dir/venv/bin/pip" download -q --no-deps --no-binary=:all: --require-hashes \
    -d "$dir" -r "$here/sources.txt" >&2
  for source in "$dir"/*.tar.gz; do tar -xzf "$source" -C "$dir"; done
  # The tests of pg8000 log in as postgres to the database postgres.
  sed -i 's/{"user": "postgres", "password": "pw"}/{"user": environ["PGUSER"], "database": environ["PGDATABASE"], "password": "pw"}/' \
    "$dir"/pg8000-*/test/*/conftest.py
  touch "$dir/complete"
fi
echo "$dir"
