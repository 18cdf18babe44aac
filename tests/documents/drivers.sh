#!/usr/bin/env bash
# Downloads the drivers and pools of docs/applications.md into a directory, and prints its path: for Python from PyPI,
# for Node from npm.
set -euo pipefail
cd "$(dirname "$0")/../.."
. deploy/local/lib.sh
dir=${MAYFLY_CACHE:-/var/cache/mayfly}/drivers-1
if [ ! -e "$dir/complete" ]; then
  # It installs node, npm and venv, if they are missing.
  helm/tools.sh >/dev/null
  say "fetching drivers of PostgreSQL …"
  mkdir -p "$dir"
  rm -rf "${dir:?}"/*
  python3 -m venv "$dir/venv"
  "$dir/venv/bin/pip" install -q 'psycopg[binary]==3.3.*' 'psycopg-pool==3.3.*' 'psycopg2-binary==2.9.*' \
    'SQLAlchemy==2.0.*' 'asyncpg==0.31.*' >&2
  (cd "$dir" && npm install --silent --no-audit --no-fund pg@8 >&2)
  touch "$dir/complete"
fi
echo "$dir"
