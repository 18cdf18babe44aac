#!/usr/bin/env bash
# Starts a private system, leaves it running and prints how to use it. Does nothing if it runs already.
# down.sh stops it. MAYFLY_PROFILE=release for the optimized build.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/system.sh"
place=$root/.run

usage() {
  cat <<TEXT

In a shell:

  export PATH=$(bins):$pg_bin:\$PATH
  export MAYFLY_ADDRESS=$MAYFLY_ADDRESS
  export MAYFLY_TOKEN_FILE=$MAYFLY_TOKEN_FILE

Then, for example:

  mayfly status
  mayfly secret read db:postgresql:dyn1 --ttl 60
  mayfly exec db:postgresql:dyn1 -- psql -c 'SELECT * FROM invoices'
  mayfly lease list
  mayfly engine list

The admin's own login (it owns the sample table, and is no superuser):

  PGPASSWORD='$admin_password' psql -h 127.0.0.1 -p $pg_port -U $admin postgres

Logs: $dir/log. Stop all of it with: make down
TEXT
}

failed() {
  local status=$?
  trap - EXIT INT TERM HUP
  [ "$status" -ne 0 ] || exit 0
  say "stopping what was started …"
  stop_system || true
  if [ -n "$fresh" ]; then rm -rf "$dir" "$place"; fi
  exit "$status"
}

fresh=
if [ -d "$place/system" ]; then
  dir=$(cd -P "$place/system" && pwd)
  if [ -z "$(not_running)" ]; then
    pg_bin=$("$here/postgres.sh" bin "$dir/postgres")
    pg_port=$(cat "$dir/postgres/port")
    use_system
    say "Mayfly is running already."
    usage
    exit 0
  fi
  say "these have stopped: $(not_running | paste -sd ' ')"
fi

"$here/install.sh"
build
if [ ! -d "$place/system" ]; then
  fresh=yes
  new_directory mayfly-up
  mkdir -p "$place"
  ln -sfn "$dir" "$place/system"
fi
trap failed EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
trap 'exit 129' HUP
say "starting RabbitMQ and PostgreSQL …"
start_servers
fill_database
say "starting a dispatcher and ${#engines[@]} engines …"
start_dispatcher
create_pool
start_engines
write_bodies
create_secret root root.json
create_secret dyn1 dyn1.json
say "Mayfly is running."
usage
