#!/usr/bin/env bash
# Runs a command with a private RabbitMQ and private PostgreSQL servers, and stops all of them.
#   with-servers.sh [--pg18] COMMAND…
# Exports MAYFLY_TEST_DIR, MAYFLY_TEST_BROKER (its directory), MAYFLY_TEST_PG15 and, with --pg18,
# MAYFLY_TEST_PG18 (directories of postgres.sh).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/lib.sh"
pg18=
if [ "${1:-}" = --pg18 ]; then
  pg18=1
  shift
fi
[ $# -gt 0 ] || die "a command is needed"

dir=$(mktemp -d "${TMPDIR:-/tmp}/mayfly-test.XXXXXX")
chmod 711 "$dir"
export MAYFLY_TEST_DIR=$dir MAYFLY_TEST_BROKER=$dir/broker MAYFLY_TEST_PG15=$dir/pg15

# Processes that still have the directory in their command line, except our own.
leftovers() {
  local entry pid line
  for entry in /proc/[0-9]*; do
    pid=${entry#/proc/}
    [ "$pid" = $$ ] && continue
    # Many end during this loop.
    line=$({ tr '\0' ' ' <"$entry/cmdline"; } 2>/dev/null || true)
    if [[ $line == *"$dir"* ]] && alive "$pid"; then
      echo "$pid: ${line:0:200}"
    fi
  done
}

finish() {
  local status=$? left
  trap - EXIT INT TERM
  "$here/rabbitmq.sh" stop "$dir/broker" || true
  for server in pg15 pg18; do
    if [ -d "$dir/$server" ]; then "$here/postgres.sh" stop "$dir/$server" || true; fi
  done
  left=$(leftovers)
  if [ -n "$left" ]; then
    say "the command has left these processes running:"
    say "$left"
    [ "$status" -ne 0 ] || status=1
  fi
  # Disks of tests that did not finish.
  while read -r _ place _; do
    if [[ $place == "$dir"/* ]]; then umount --lazy "$place"; fi
  done </proc/mounts
  if [ -n "${MAYFLY_TEST_KEEP:-}" ] && [ "$status" -ne 0 ]; then
    say "kept the directory $dir"
  else
    rm -rf "$dir"
  fi
  exit "$status"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# Tests need no durable servers; a benchmark does.
export MAYFLY_PG_FSYNC=${MAYFLY_PG_FSYNC:-off}
"$here/rabbitmq.sh" start "$dir/broker" & started=($!)
"$here/postgres.sh" start "$dir/pg15" & started+=($!)
if [ -n "$pg18" ]; then
  export MAYFLY_TEST_PG18=$dir/pg18
  "$here/postgres.sh" start "$dir/pg18" 18 & started+=($!)
fi
for one in "${started[@]}"; do
  wait "$one" || die "a server did not start"
done
"$@"
