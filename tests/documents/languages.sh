#!/usr/bin/env bash
# Installs what the snippets of docs/applications.md in Java, Go and Ruby need, from Debian, and builds the one in Rust.
set -euo pipefail
cd "$(dirname "$0")/../.."
. deploy/local/lib.sh
missing=()
for package in openjdk-17-jdk-headless libhikaricp-java libpostgresql-jdbc-java libslf4j-java golang-go \
  golang-github-jackc-pgx-v4-dev ruby-activerecord ruby-pg; do
  dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed || missing+=("$package")
done
if [ ${#missing[@]} -gt 0 ]; then
  say "installing ${missing[*]} …"
  { apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends "${missing[@]}"; } >/dev/null ||
    die "apt-get could not install ${missing[*]}"
fi
# The tests have no network: what the program is made of is built before.
mkdir -p target/documents
PYTHONPATH=tests/documents PYTHONDONTWRITEBYTECODE=1 python3 >target/documents/snippet.rs - <<'PY'
from blocks import blocks_of
print("".join(block.text for block in blocks_of("docs/applications.md") if block.language == "rust"), end="")
PY
SNIPPET=$PWD/target/documents/snippet.rs cargo build --quiet --locked --manifest-path tests/documents/users/sqlx/Cargo.toml \
  --target-dir target/documents
