#!/usr/bin/env bash
# A private PostgreSQL cluster in its own directory, on loopback, with SCRAM and TLS.
#   postgres.sh start DIR [18]  writes DIR/port and DIR/superuser-password. The version is 14, 16, 17, 18 or,
#                               by default, Debian's. With an existing DIR it starts the same cluster again
#   postgres.sh standby DIR OF  a streaming, hot standby of the cluster in directory OF
#   postgres.sh upgrade DIR 18  upgrades the cluster with pg_upgrade, and starts it
#   postgres.sh stop DIR        shuts it down (fast mode)
#   postgres.sh kill DIR        SIGKILL: a crash; `start` recovers it
#   postgres.sh bin DIR         where its programs are
# MAYFLY_PG_FSYNC=off, MAYFLY_PG_SSL=off, MAYFLY_PG_OPTIONS (lines for postgresql.conf),
# MAYFLY_PG_CLOCK (the difference of its clock: "+300s" is ahead, "-300s" is behind) at the first start.
set -euo pipefail
# The caller's umask does not count: servers run as other users.
umask 022
here=$(cd "$(dirname "$0")" && pwd)
. "$here/lib.sh"
verb=${1:?start, standby, upgrade, stop, kill or bin}
mkdir -p "${2:?a directory}"
dir=$(cd "$2" && pwd)

find_bin() {
  case ${1:-} in
    14 | 16 | 17 | 18) echo "${MAYFLY_CACHE:-/var/cache/mayfly}/postgresql-$1/bin" ;;
    *) printf '%s\n' /usr/lib/postgresql/*/bin | sort -V | tail -n 1 ;;
  esac
}
postmaster() { head -n 1 "$dir/data/postmaster.pid" 2>/dev/null || true; }

# PostgreSQL refuses to run as root.
as_owner() {
  if [ "$(id -u)" = 0 ]; then
    setpriv --reuid=postgres --regid=postgres --clear-groups -- "$@"
  else
    "$@"
  fi
}

launch() {
  local bin port
  bin=$(cat "$dir/bin") port=$(cat "$dir/port")
  # The server must not inherit the caller's streams: a program that reads them would wait until the server ends.
  local environment=()
  if [ -e "$dir/environment" ]; then mapfile -t environment <"$dir/environment"; fi
  (cd "$dir" && as_owner env "${environment[@]}" setsid "$bin/postgres" -D "$dir/data" -p "$port") >>"$dir/log" 2>&1 </dev/null &
  for _ in $(seq 600); do
    # pg_ctl uses the same sign that the server accepts connections.
    case $(sed -n 8p "$dir/data/postmaster.pid" 2>/dev/null | tr -d ' ') in
      ready | standby) return 0 ;;
    esac
    sleep 0.05
    if grep -q 'FATAL' "$dir/log" 2>/dev/null && ! alive "$(postmaster)"; then return 1; fi
  done
  return 1
}

case $verb in
  start)
    ours "$(postmaster)" "$dir" && exit 0
    if [ -e "$dir/data/PG_VERSION" ]; then
      rm -f "$dir/data/postmaster.pid"
      : >"$dir/log"
      launch || { tail -n 20 "$dir/log" >&2; die "PostgreSQL did not start again"; }
      exit 0
    fi
    bin=$(find_bin "${3:-}")
    [ -x "$bin/postgres" ] || die "no PostgreSQL in $bin; run install.sh${3:+ --for-tests}"
    if [ "$(id -u)" = 0 ] && ! id postgres >/dev/null 2>&1; then
      useradd --system --no-create-home postgres
    fi
    echo "$bin" >"$dir/bin"
    if [ -n "${MAYFLY_PG_CLOCK:-}" ]; then
      printf '%s\n' "LD_PRELOAD=$(ls /usr/lib/*/faketime/libfaketime.so.1)" "FAKETIME=$MAYFLY_PG_CLOCK" \
        FAKETIME_DONT_FAKE_MONOTONIC=1 >"$dir/environment"
    fi
    (umask 077; random_text >"$dir/superuser-password")
    : >"$dir/log"
    if [ "$(id -u)" = 0 ]; then chown -R postgres:postgres "$dir"; fi
    as_owner "$bin/initdb" -D "$dir/data" -U postgres --pwfile="$dir/superuser-password" \
      --auth=scram-sha-256 --encoding=UTF8 --locale=C.UTF-8 --no-sync >"$dir/log" 2>&1 ||
      { tail -n 20 "$dir/log" >&2; die "initdb failed"; }
    : >"$dir/log"
    {
      echo "listen_addresses = '127.0.0.1'"
      echo "unix_socket_directories = ''"
      echo "password_encryption = 'scram-sha-256'"
      echo "max_connections = 400"
      echo "max_prepared_transactions = 10"
      echo "shared_buffers = 32MB"
      [ "${MAYFLY_PG_FSYNC:-on}" = on ] || printf 'fsync = off\nfull_page_writes = off\n'
      if [ "${MAYFLY_PG_SSL:-on}" = on ] && command -v openssl >/dev/null; then
        (umask 077; openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 30 \
          -subj /CN=localhost -addext subjectAltName=DNS:localhost,IP:127.0.0.1 \
          -keyout "$dir/data/server.key" -out "$dir/data/server.crt" 2>/dev/null)
        echo "ssl = on"
      fi
      printf '%s\n' "${MAYFLY_PG_OPTIONS:-}"
    } >>"$dir/data/postgresql.conf"
    if [ "$(id -u)" = 0 ] && [ -e "$dir/data/server.key" ]; then
      chown postgres:postgres "$dir/data/server.key" "$dir/data/server.crt"
    fi
    for _ in 1 2 3; do
      free_port >"$dir/port"
      launch && exit 0
      : >"$dir/log"
    done
    tail -n 20 "$dir/log" >&2
    die "PostgreSQL did not start"
    ;;
  standby)
    primary=$(cd "${3:?the directory of the primary}" && pwd)
    bin=$(cat "$primary/bin")
    cp "$primary/bin" "$primary/superuser-password" "$dir/"
    : >"$dir/log"
    if [ "$(id -u)" = 0 ]; then chown -R postgres:postgres "$dir"; fi
    PGPASSWORD=$(cat "$primary/superuser-password") as_owner "$bin/pg_basebackup" \
      -h 127.0.0.1 -p "$(cat "$primary/port")" -U postgres -D "$dir/data" \
      --write-recovery-conf --checkpoint=fast --no-sync >"$dir/log" 2>&1 ||
      { tail -n 20 "$dir/log" >&2; die "pg_basebackup failed"; }
    # The server may have an older libpq, which does not know every option that pg_basebackup has written.
    echo "primary_conninfo = 'host=127.0.0.1 port=$(cat "$primary/port") user=postgres password=$(cat "$primary/superuser-password")'" \
      >>"$dir/data/postgresql.auto.conf"
    : >"$dir/log"
    for _ in 1 2 3; do
      free_port >"$dir/port"
      launch && exit 0
      : >"$dir/log"
    done
    tail -n 20 "$dir/log" >&2
    die "the standby did not start"
    ;;
  upgrade)
    "$0" stop "$dir"
    old=$(cat "$dir/bin") bin=$(find_bin "${3:?a version}")
    mv "$dir/data" "$dir/data.old"
    # 18 has checksums by default, and pg_upgrade needs the same in both clusters.
    checksums=()
    if [ "$3" -ge 18 ]; then checksums=(--no-data-checksums); fi
    export PGPASSWORD
    PGPASSWORD=$(cat "$dir/superuser-password")
    cd "$dir"
    as_owner "$bin/initdb" -D "$dir/data" -U postgres --pwfile="$dir/superuser-password" \
      --auth=scram-sha-256 --encoding=UTF8 --locale=C.UTF-8 --no-sync "${checksums[@]}" >"$dir/upgrade.log" 2>&1 &&
      as_owner "$bin/pg_upgrade" -b "$old" -B "$bin" -d "$dir/data.old" -D "$dir/data" -U postgres \
        >>"$dir/upgrade.log" 2>&1 || { tail -n 20 "$dir/upgrade.log" >&2; die "pg_upgrade failed"; }
    sed -n "/^listen_addresses = /,\$p" "$dir/data.old/postgresql.conf" >>"$dir/data/postgresql.conf"
    for file in server.key server.crt; do
      if [ -e "$dir/data.old/$file" ]; then cp -p "$dir/data.old/$file" "$dir/data/"; fi
    done
    echo "$bin" >"$dir/bin"
    : >"$dir/log"
    launch || { tail -n 20 "$dir/log" >&2; die "PostgreSQL did not start again"; }
    ;;
  stop)
    running=$(postmaster)
    if ours "$running" "$dir"; then
      kill -INT "$running"
      wait_gone "$running" 30 || die "PostgreSQL does not stop"
    fi
    ;;
  kill)
    running=$(postmaster)
    if ours "$running" "$dir"; then
      children=$(ps -o pid= --ppid "$running" 2>/dev/null || true)
      kill -9 "$running"
      # Without the postmaster its child processes end.
      for child in $running $children; do
        wait_gone "$child" 10 || kill -9 "$child" 2>/dev/null || true
      done
    fi
    ;;
  bin) cat "$dir/bin" ;;
  *) die "unknown: $verb" ;;
esac
