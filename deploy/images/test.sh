#!/usr/bin/env bash
# Runs the programs of the images that build.sh has made, as a container would: test.sh DIR. They have uid 65532, no
# capabilities, and only the image's files, which are read-only except for mounts. With them the test issues and
# revokes accounts, on the real servers of with-servers.sh.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/../local/lib.sh"
images=$(cd "${1:?the directory of the images}" && pwd)
run=${MAYFLY_TEST_DIR:?run by with-servers.sh}/images
mkdir -m 711 "$run"
pids=()
stop_all() { for pid in "${pids[@]}"; do kill -9 "$pid" 2>/dev/null || true; done; }
trap stop_all EXIT
ok() { echo "images: $*: ok"; }

for image in mayfly-dispatcher mayfly-engine mayfly; do
  tag=$(umoci ls --layout "$images/$image")
  umoci unpack --image "$images/$image:$tag" "$run/$image" >/dev/null
done

# of IMAGE: its user, entry point and environment, one on each line.
of() {
  python3 - "$run/$1/config.json" <<'PY'
import json, sys
process = json.load(open(sys.argv[1]))["process"]
print(f"{process['user']['uid']}:{process['user']['gid']}", *process["args"][:1], *process["env"], sep="\n")
PY
}

# inside IMAGE [FROM:TO[:rw]…] [NAME=VALUE…] -- [ARGUMENT…]: becomes the image's program.
inside() {
  local image=$1 mounts=() settings=() user entry
  shift
  while [ "$1" != -- ]; do
    case $1 in /*) mounts+=("$1") ;; *) settings+=("$1") ;; esac
    shift
  done
  shift
  { read -r user && read -r entry && mapfile -t defaults; } < <(of "$image")
  exec unshare --mount --propagation private bash -euc '
    root=$1
    shift
    mount --bind "$root" "$root"
    mkdir -p "$root/dev" "$root/proc"
    mount -t proc proc "$root/proc"
    mount -t tmpfs tmpfs "$root/dev"
    for device in null zero random urandom; do
      touch "$root/dev/$device"
      mount --bind "/dev/$device" "$root/dev/$device"
    done
    while [ "$1" != -- ]; do
      IFS=: read -r from to mode <<<"$1"
      if [ -d "$from" ]; then mkdir -p "$root$to"; else mkdir -p "$(dirname "$root$to")" && touch "$root$to"; fi
      mount --bind "$from" "$root$to"
      [ "$mode" = rw ] || mount -o remount,bind,ro "$root$to"
      shift
    done
    shift
    mount -o remount,bind,ro "$root"
    exec env -i "$@"' bash "$run/$image/rootfs" "${mounts[@]}" -- "${defaults[@]}" "${settings[@]}" \
    /usr/bin/setpriv --no-new-privs /usr/sbin/chroot --userspec="$user" --groups= "$run/$image/rootfs" "$entry" "$@"
}

# Every image, without settings.
for image in mayfly-dispatcher mayfly-engine mayfly; do
  [ "$(find "$run/$image/rootfs" -type f | wc -l)" = 2 ] || die "$image: it has other files than the program and the certificates"
  [ "$(of "$image" | head -n 2 | paste -sd ' ')" = "65532:65532 /$image" ] || die "$image: another user or entry point"
  (inside "$image" -- --version) | grep -qx "$image [0-9.]*" || die "$image: --version"
done
ok "one static program and certificates each, uid 65532"

# Keys and URLs as Kubernetes mounts them: readable by the group.
secret() {
  install -D -m 440 -g 65532 /dev/stdin "$run/$1"
}
held() { python3 -c 'import base64, json, sys; sys.stdout.buffer.write(base64.b64decode(json.load(sys.stdin)["data"][sys.argv[1]]))' "$1"; }
(inside mayfly -- init --secret keys) >"$run/keys.json"
for key in master-key root-token; do held $key <"$run/keys.json" | secret keys/$key; done
broker=$(sed 's|.*@\(.*\)/.*|\1|' "$MAYFLY_TEST_BROKER/amqp-url")
MAYFLY_VHOST=images MAYFLY_BROKER=$broker "$here/../rabbitmq/users.sh" "$run/users" orders
"$here/../local/rabbitmq.sh" ctl "$MAYFLY_TEST_BROKER" -q import_definitions "$run/users/definitions.json" >/dev/null
secret amqp-dispatcher/url <"$run/users/dispatcher-amqp-url"
secret amqp-engine/url <"$run/users/engine-orders-amqp-url"
install -d -m 700 -o 65532 -g 65532 "$run/data"
http=$(free_port) admin=$(free_port) engine_admin=$(free_port)

# More settings and mounts of the dispatcher.
store=()
dispatcher() {
  inside mayfly-dispatcher "${store[@]}" "$run/data:/var/lib/mayfly:rw" "$run/keys:/etc/mayfly/keys" "$run/amqp-dispatcher:/etc/mayfly/amqp" /etc/hosts:/etc/hosts \
    MAYFLY__AMQP__URL_FILE=/etc/mayfly/amqp/url MAYFLY__SEAL__KEY_FILE=/etc/mayfly/keys/master-key \
    MAYFLY__INIT__ROOT_TOKEN_FILE=/etc/mayfly/keys/root-token \
    MAYFLY__HTTP__LISTEN=127.0.0.1:$http MAYFLY__ADMIN__LISTEN=127.0.0.1:$admin -- "$@"
}
engine() {
  inside mayfly-engine "$run/pool:/etc/mayfly/pool" "$run/amqp-engine:/etc/mayfly/amqp" /etc/hosts:/etc/hosts \
    MAYFLY__AMQP__URL_FILE=/etc/mayfly/amqp/url MAYFLY__POOL__KEY_FILE=/etc/mayfly/pool/pool.key \
    MAYFLY__ADMIN__LISTEN=127.0.0.1:$engine_admin -- "$@"
}
# as DIRECTORY/FILE [ARGUMENT…]: the command line with the token in that secret.
as() {
  (inside mayfly "$run/${1%/*}:/etc/mayfly/token" /etc/hosts:/etc/hosts MAYFLY_ADDRESS=http://localhost:$http \
    MAYFLY_TOKEN_FILE="/etc/mayfly/token/${1##*/}" -- "${@:2}")
}
mayfly() { as keys/root-token "$@"; }
# is_ready PORT
is_ready() {
  local line
  { exec 3<>"/dev/tcp/127.0.0.1/$1"; } 2>/dev/null || return 1
  printf 'GET /readyz HTTP/1.0\r\n\r\n' >&3
  read -r line <&3
  exec 3>&-
  [[ $line == *" 200 "* ]]
}
# start NAME PORT: until it is ready.
start() {
  ($1) >>"$run/$1.log" 2>&1 </dev/null &
  pids+=($!)
  for _ in $(seq 300); do
    if is_ready "$2"; then return 0; fi
    alive "${pids[-1]}" || break
    sleep 0.1
  done
  tail -n 20 "$run/$1.log" >&2
  die "the $1 of the image is not ready"
}
eventually() {
  for _ in $(seq 100); do
    if "$@" >/dev/null 2>&1; then return 0; fi
    sleep 0.1
  done
  return 1
}

(dispatcher --check-config) | grep -q 'data_dir = "/var/lib/mayfly"' || die "mayfly-dispatcher: --check-config"
start dispatcher "$admin"
eventually mayfly status || die "mayfly status: $(mayfly status 2>&1)"
mayfly pool create orders --secret mayfly-pool-orders | held pool.key | secret pool/pool.key
(engine --check-config) | grep -q 'name = "orders"' || die "mayfly-engine: --check-config"
start engine "$engine_admin"
for pid in "${pids[@]}"; do
  [ "$(awk '/^(Uid|Gid):/ { print $2, $3, $4, $5 }' "/proc/$pid/status" | sort -u)" = "65532 65532 65532 65532" ] || die "another user"
  grep -q '^CapEff:[[:space:]]*0*$' "/proc/$pid/status" || die "capabilities"
  awk '$5 == "/" { options = $6 } END { exit options !~ /^ro/ }' "/proc/$pid/mountinfo" || die "a root that can be written to"
done
ok "they start as uid 65532, without capabilities, on a read-only root"

pg=$MAYFLY_TEST_PG15
psql="$("$here/../local/postgres.sh" bin "$pg")/psql"
port=$(cat "$pg/port")
# sql USER PASSWORD STATEMENT
sql() { PGPASSWORD=$2 PGCONNECT_TIMEOUT=5 "$psql" -XqAt -h 127.0.0.1 -p "$port" -U "$1" -d postgres -c "$3" </dev/null; }
superuser=$(cat "$pg/superuser-password")
password=$(random_text)
sql postgres "$superuser" "CREATE ROLE image_admin LOGIN CREATEROLE PASSWORD '$password'"
sql postgres "$superuser" "CREATE SCHEMA image AUTHORIZATION image_admin"
sql image_admin "$password" "CREATE TABLE image.invoices (number integer)"
mayfly secret create --body - >/dev/null <<JSON
{"path": "db:root", "attributes": {"type": "postgresql"},
 "data": {"host": "localhost", "port": $port, "username": "image_admin", "password": "$password", "database": "postgres"}}
JSON
mayfly secret create --body - >/dev/null <<'JSON'
{"path": "db:reader", "attributes": {"grantPermissions": {"what": "SELECT", "where": "image.*"}, "linkConfig": {"linkType": "dynamic", "linkedSecret": "db:root"},
 "pool": "orders", "ttl": 600}, "data": {}}
JSON
for way in revoked expired; do
  ttl=$([ $way = expired ] && echo 3 || echo 600)
  answer=$(mayfly secret read db:reader --ttl "$ttl" -e json)
  value() { python3 -c 'import json, sys; print(json.load(sys.stdin)["data"][sys.argv[1]])' "$1" <<<"$answer"; }
  user=$(value username) secret=$(value password)
  [ "$(sql "$user" "$secret" 'SELECT count(*) FROM image.invoices')" = 0 ] || die "the account cannot log in"
  [ $way = expired ] || mayfly lease revoke "$(value leaseId)" >/dev/null
  gone() { [ "$(sql postgres "$superuser" "SELECT count(*) FROM pg_roles WHERE rolname = '$user'")" = 0 ]; }
  eventually gone || die "the role is still there"
  ! sql "$user" "$secret" 'SELECT 1' 2>/dev/null || die "the login still works"
  ok "an account is issued and $way"
done

# One lease is not enough: SQLite uses temporary files only after some tens of leases, and no directory here is
# writable for them.
# many N: reads, renews and revokes N leases. Every call must succeed.
many() {
  python3 - "$http" "$run/keys/root-token" "$1" <<'PY'
import concurrent.futures, json, sys, urllib.request
port, token, count = sys.argv[1], open(sys.argv[2]).read().strip(), int(sys.argv[3])
def ask(method, path, body=None):
    data = None if body is None else json.dumps(body).encode()
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/{path}", data, headers, method=method)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)
def one(_):
    lease = ask("GET", "secrets/db:reader")["data"]["leaseId"]
    ask("POST", f"leases/{lease}/renew", {"increment": 700})
    ask("DELETE", f"leases/{lease}")
with concurrent.futures.ThreadPoolExecutor(4) as threads:
    list(threads.map(one, range(count)))
PY
}
# Leases of 31 days ago are forgotten. The test cannot change the time of one program, so it inserts such leases into
# the store by hand. Only their end counts, not their authentication codes.
old=$(($(date +%s%3N) - 31 * 86400000))
# in_sqlite STATEMENT: with :old the date; the first cell.
in_sqlite() {
  python3 - "$run/data/mayfly.db" "$old" "$1" <<'PY'
import sqlite3, sys
database = sqlite3.connect(sys.argv[1], timeout=10)
row = database.execute(sys.argv[3], {"old": int(sys.argv[2])}).fetchone()
database.commit()
print(row[0] if row else "")
PY
}
in_postgresql() {
  PGPASSWORD=$store_password "$psql" -XqAt -h 127.0.0.1 -p "$port" -U image_store -d image_store -v ON_ERROR_STOP=1 -c "$1" </dev/null
}
# age STORE: inserts 2500 such leases.
age() {
  local columns
  if [ "$1" = sqlite ]; then
    columns=$(in_sqlite "SELECT group_concat(CASE name WHEN 'id' THEN 'lower(hex(randomblob(16)))' WHEN 'created' THEN ' :old '
      WHEN 'state' THEN quote('revoked') WHEN 'next_reconcile' THEN 'NULL' ELSE name END) FROM pragma_table_info('leases')")
    in_sqlite "WITH RECURSIVE n (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < 2500)
      INSERT INTO leases SELECT $columns FROM (SELECT * FROM leases LIMIT 1), n"
  else
    in_postgresql "INSERT INTO public.leases SELECT (jsonb_populate_record(l, jsonb_build_object('id', gen_random_uuid()::text, 'created', $old,
      'state', 'revoked', 'next_reconcile', NULL))).* FROM public.leases l, generate_series(1, 2500) LIMIT 2500"
  fi >/dev/null
}
none_is_old() {
  if [ "$1" = sqlite ]; then
    [ "$(in_sqlite "SELECT count(*) FROM leases WHERE created <= :old")" = 0 ]
  else
    [ "$(in_postgresql "SELECT count(*) FROM public.leases WHERE created <= $old")" = 0 ]
  fi
}
# restarted COMMAND…: stops the dispatcher, runs the command, and starts it again.
restarted() {
  kill -TERM "${pids[0]}"
  wait "${pids[0]}" || die "its exit status after SIGTERM is not 0"
  "$@"
  local rest=("${pids[@]:1}")
  start dispatcher "$admin"
  pids=("${pids[-1]}" "${rest[@]}")
  eventually mayfly secret read db:reader || die "no lease after a restart: $(mayfly secret read db:reader 2>&1 >/dev/null)"
}
# used STORE: uses a store as in a month.
used() {
  many 150 || die "a lease failed: $(tail -n 3 "$run/dispatcher.log")"
  mayfly lease reconcile >/dev/null || die "mayfly lease reconcile"
  restarted age "$1"
  many 50 || die "a lease failed after a restart: $(tail -n 3 "$run/dispatcher.log")"
  for _ in 1 2 3; do if eventually none_is_old "$1"; then break; fi; done
  none_is_old "$1" || die "leases of 31 days ago are not forgotten: $(tail -n 3 "$run/dispatcher.log")"
  ! grep -m 3 "the lease store failed" "$run/dispatcher.log" || die "a job of the store failed"
  ok "$1: 200 leases are issued, renewed and revoked, with a restart between, and 2500 old ones are forgotten"
}
used sqlite

# The program copies the store to standard output, and moves it to PostgreSQL.
(dispatcher --backup -) >"$run/copy.db" 2>>"$run/dispatcher.log" || die "mayfly-dispatcher --backup -"
[ "$(head -c 15 "$run/copy.db")" = "SQLite format 3" ] || die "mayfly-dispatcher --backup -: the output is not a SQLite database"
store_password=$(random_text)
sql postgres "$superuser" "CREATE ROLE image_store LOGIN PASSWORD '$store_password'"
sql postgres "$superuser" "CREATE DATABASE image_store OWNER image_store"
secret store/url <<<"postgres://image_store:$store_password@localhost:$port/image_store"
move() {
  store=("$run/store:/etc/mayfly/store")
  (dispatcher --copy-store /etc/mayfly/store/url) >>"$run/dispatcher.log" 2>&1 ||
    die "mayfly-dispatcher --copy-store: $(tail -n 3 "$run/dispatcher.log")"
  store+=(MAYFLY__STORE__URL_FILE=/etc/mayfly/store/url)
}
restarted move
used postgresql

# The command of `helm test`, with a token that may only read this secret.
mayfly token create --read db:reader --ttl 5m -f token | secret tests/token
as tests/token exec db:reader -- /mayfly --version >/dev/null || die "mayfly exec: $?"
! as tests/token status >/dev/null 2>&1 || die "the token may do more than read"
ok "a command runs with an account, and a token for it alone"

for pid in "${pids[@]}"; do
  kill -TERM "$pid"
  wait "$pid" || die "its exit status after SIGTERM is not 0"
done
pids=()
ok "they end well at SIGTERM"
