# A whole private system in the directory $dir: RabbitMQ, PostgreSQL with an admin and a sample
# table, a dispatcher, the pool `pool1` with three engines, and two secrets. Sourced by demo.sh,
# up.sh and down.sh, which set `here` and `dir`. Processes that run already are not started again.
. "$here/lib.sh"

root=$(cd "$here/../.." && pwd)
profile=${MAYFLY_PROFILE:-debug}
engines=(engine-a engine-b engine-c)
admin=admin
admin_password='P@ssword!'
starting=()

# The caller's settings must have no effect.
unset "${!MAYFLY__@}" "${!PG@}" MAYFLY_TOKEN

build() {
  command -v cargo >/dev/null || die "cargo is not in PATH; get Rust from https://rustup.rs"
  case $profile in
    debug) (cd "$root" && cargo build --workspace --bins --locked) ;;
    release) (cd "$root" && cargo build --workspace --bins --locked --release) ;;
    *) die "MAYFLY_PROFILE must be debug or release" ;;
  esac
}
bins() { (cd "$root" && cd "${CARGO_TARGET_DIR:-target}/$profile" && pwd); }
mayfly() { "$(bins)/mayfly" "$@"; }
# How the command line is called while the system is prepared. demo.sh also shows the call.
typed() { "$@" >/dev/null; }

# A new directory that PostgreSQL's user can enter.
new_directory() {
  dir=$(mktemp -d "${TMPDIR:-/tmp}/$1.XXXXXX")
  chmod 711 "$dir"
  mkdir -m 700 "$dir/log" "$dir/pid"
}

start_servers() {
  local one log=$dir/log/servers
  # In another session, so that Ctrl-C does not stop them halfway (stop_system waits for them), and without the
  # caller's pipes.
  setsid "$here/rabbitmq.sh" start "$dir/broker" >>"$log" 2>&1 </dev/null & starting=($!)
  setsid "$here/postgres.sh" start "$dir/postgres" >>"$log" 2>&1 </dev/null & starting+=($!)
  for one in "${starting[@]}"; do
    wait "$one" || { tail -n 20 "$log" >&2; die "a server did not start"; }
  done
  starting=()
  pg_bin=$("$here/postgres.sh" bin "$dir/postgres")
  pg_port=$(cat "$dir/postgres/port")
  make_users
}

# The broker's users, with the rights of deploy/rabbitmq: one for the dispatcher, one for the engines.
make_users() {
  [ ! -e "$dir/users/definitions.json" ] || return 0
  MAYFLY_VHOST=/ MAYFLY_BROKER=$(sed 's|.*@\(.*\)/.*|\1|' "$dir/broker/amqp-url") \
    "$here/../rabbitmq/users.sh" "$dir/users" pool1
  "$here/rabbitmq.sh" ctl "$dir/broker" -q import_definitions "$dir/users/definitions.json" >/dev/null
}

# sql USER PASSWORD [psql's arguments]: psql without prompts, with SQLSTATEs in its errors.
sql() {
  local user=$1 password=$2
  shift 2
  PGPASSWORD=$password PGPASSFILE=/dev/null PGCONNECT_TIMEOUT=5 \
    "$pg_bin/psql" -XwqAt -v ON_ERROR_STOP=1 -v VERBOSITY=sqlstate \
    -h 127.0.0.1 -p "$pg_port" -U "$user" -d postgres "$@"
}
admin_sql() { sql "$admin" "$admin_password" "$@"; }

# An admin that is not a superuser, and three rows.
fill_database() {
  [ ! -e "$dir/filled" ] || return 0
  sql postgres "$(cat "$dir/postgres/superuser-password")" >/dev/null <<SQL
BEGIN;
CREATE ROLE $admin LOGIN CREATEROLE PASSWORD '$admin_password';
ALTER DATABASE postgres OWNER TO $admin;
COMMIT;
SQL
  admin_sql >/dev/null <<'SQL'
CREATE TABLE invoices (number integer PRIMARY KEY, customer text NOT NULL, amount numeric NOT NULL);
INSERT INTO invoices VALUES (1, 'Ada', 120.50), (2, 'Grace', 80.00), (3, 'Edsger', 310.25);
SQL
  touch "$dir/filled"
}

# pid_of NAME: the process id of the dispatcher or of an engine, if it runs. Another process with the same number does
# not count.
pid_of() {
  local pid
  pid=$(cat "$dir/pid/$1" 2>/dev/null) || return 1
  alive "$pid" && grep -qaF -- "$dir/" "/proc/$pid/cmdline" 2>/dev/null && echo "$pid"
}

# run NAME PROGRAM [ARGUMENTS]: in the background, until it is ready.
run() {
  local name=$1 program=$2 port pid
  shift 2
  if pid_of "$name" >/dev/null; then return 0; fi
  for _ in 1 2 3; do
    port=$(free_port)
    setsid "$(bins)/$program" "$@" --admin-listen "127.0.0.1:$port" \
      >>"$dir/log/$name" 2>&1 </dev/null &
    pid=$!
    disown "$pid"
    echo "$pid" >"$dir/pid/$name"
    for _ in $(seq 600); do
      alive "$pid" || continue 2
      if curl -fs --noproxy '*' --max-time 2 -o /dev/null "http://127.0.0.1:$port/readyz"; then return 0; fi
      sleep 0.05
    done
    break
  done
  tail -n 10 "$dir/log/$name" >&2
  die "$name is not ready"
}

# eventually SECONDS COMMAND…: repeats it until it succeeds.
eventually() {
  local end=$((SECONDS + $1))
  shift
  until "$@"; do
    [ $SECONDS -lt $end ] || return 1
    sleep 0.1
  done
}
broker_is_up() { mayfly status >/dev/null 2>&1; }
engines_are_seen() { [ "$(mayfly engine list -f length 2>/dev/null)" = ${#engines[@]} ]; }

start_dispatcher() {
  [ -e "$dir/http-port" ] || free_port >"$dir/http-port"
  use_system
  run dispatcher mayfly-dispatcher --data-dir "$dir/data" --amqp-url-file "$dir/users/dispatcher-amqp-url" \
    --http-listen "${MAYFLY_ADDRESS#http://}"
  eventually 30 broker_is_up || die "the dispatcher does not reach the broker"
}
# How the command line reaches the dispatcher.
use_system() {
  MAYFLY_ADDRESS=http://127.0.0.1:$(cat "$dir/http-port")
  MAYFLY_TOKEN_FILE=$dir/data/root-token
  export MAYFLY_ADDRESS MAYFLY_TOKEN_FILE
}

create_pool() {
  [ -e "$dir/pool1.key" ] || (cd "$dir" && typed mayfly pool create pool1 --key-file pool1.key 2>/dev/null) ||
    die "the pool could not be made"
}

start_engines() {
  local name
  for name in "${engines[@]}"; do
    run "$name" mayfly-engine --name "$name" --amqp-url-file "$dir/users/engine-pool1-amqp-url" \
      --pool-key-file "$dir/pool1.key"
  done
  eventually 20 engines_are_seen || die "the dispatcher does not see the engines"
}

# The two bodies of README.md, as they are written there.
write_bodies() {
  cat >"$dir/root.json" <<JSON
{ "path": "db:postgresql:root", "attributes": {"type": "postgresql"}, "description": "postgresql root credentials",
  "data": {"host": "127.0.0.1", "password": "$admin_password", "port": $pg_port, "username": "$admin"} }
JSON
  cat >"$dir/dyn1.json" <<'JSON'
{ "path": "db:postgresql:dyn1",
  "attributes": { "grantPermissions": {"what": "SELECT", "where": "*.*"},
    "linkConfig": {"linkType": "dynamic", "linkedSecret": "db:postgresql:root"}, "pool": "pool1", "ttl": 1000, },
  "data": {}, }
JSON
}

create_secret() {
  mayfly secret describe "db:postgresql:$1" >/dev/null 2>&1 ||
    (cd "$dir" && typed mayfly secret create --body "@${2}") || die "$2 is refused"
}

# Prints the names of the parts that do not run.
not_running() {
  local name
  alive "$("$here/rabbitmq.sh" pid "$dir/broker")" || echo RabbitMQ
  alive "$(head -n 1 "$dir/postgres/data/postmaster.pid" 2>/dev/null)" || echo PostgreSQL
  for name in dispatcher "${engines[@]}"; do pid_of "$name" >/dev/null || echo "$name"; done
}

# end_processes NAME…: in this order, with SIGKILL for one that takes longer than a drain.
end_processes() {
  local name pid status=0
  for name; do
    if pid=$(pid_of "$name"); then kill -TERM "$pid" 2>/dev/null || true; fi
  done
  for name; do
    if pid=$(pid_of "$name") && ! wait_gone "$pid" 45; then
      say "$name does not stop"
      kill -9 "$pid" 2>/dev/null || true
      status=1
    fi
  done
  return $status
}

stop_system() {
  local one status=0
  for one in "${starting[@]}"; do wait "$one" || true; done
  starting=()
  end_processes "${engines[@]}" || status=1
  end_processes dispatcher || status=1
  "$here/rabbitmq.sh" stop "$dir/broker" & one=$!
  "$here/postgres.sh" stop "$dir/postgres" || status=1
  wait "$one" || status=1
  return $status
}

# Processes with the directory in their command line.
leftovers() {
  local entry pid
  for entry in /proc/[0-9]*; do
    pid=${entry#/proc/}
    if grep -qaF -- "$dir/" "$entry/cmdline" 2>/dev/null && alive "$pid"; then echo "$pid"; fi
  done
}
