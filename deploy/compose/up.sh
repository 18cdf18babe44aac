#!/usr/bin/env bash
# Starts ../compose.yaml from nothing: secrets, the broker and a dispatcher, a pool and its key, the rest, and
# two secrets to read. Twice does no harm. tests/compose runs it.
set -euo pipefail
cd "$(dirname "$0")/.."
compose/setup.sh compose/secrets
secrets=compose/secrets
version=${MAYFLY_VERSION:-0.1.0}
MAYFLY_ADDRESS=http://127.0.0.1:8470 MAYFLY_TOKEN=$(cat $secrets/root-token)
export MAYFLY_ADDRESS MAYFLY_TOKEN
# The command line of the image; only names of variables are on its own.
mayfly() { docker run --rm -i --network host -e MAYFLY_ADDRESS -e MAYFLY_TOKEN "mayfly:$version" "$@"; }

# keep DIRECTORY: its files are Mayfly's containers' alone. Who may use Docker may do that.
keep() {
  docker run --rm -v "$PWD/$secrets:/secrets" docker.io/library/postgres:18 \
    sh -c "chown -R 65532:65532 /secrets/$1 && chmod 400 /secrets/$1/*"
}

docker compose up -d --wait rabbitmq postgres
keep dispatcher
docker compose up -d dispatcher
for _ in $(seq 60); do
  if mayfly status >/dev/null 2>&1; then break; fi
  sleep 1
done
if [ ! -s $secrets/engine/pool.key ]; then
  (umask 077 && mayfly pool create pool1 -f engineKey >$secrets/engine/pool.key)
  keep engine
fi
docker compose up -d
if ! mayfly secret describe db:shop:root >/dev/null 2>&1; then
  password=$(cat $secrets/postgres-admin-password)
  echo "ALTER ROLE mayfly_admin PASSWORD '$password'" | docker compose exec -T postgres psql -q -U postgres
  # The image's server has no TLS, and the network between is this machine's own. For any other server leave
  # sslmode out, which is `require`, or verify its name: `verify-full`.
  mayfly secret create --body - >/dev/null <<JSON
{"path": "db:shop:root", "attributes": {"type": "postgresql"},
 "data": {"host": "postgres", "port": 5432, "database": "shop", "username": "mayfly_admin", "password": "$password", "sslmode": "disable"}}
JSON
  mayfly secret create --body - >/dev/null <<'JSON'
{"path": "db:shop:reader", "attributes": {"grantPermissions": {"what": "SELECT", "where": "*.*"},
 "linkConfig": {"linkType": "dynamic", "linkedSecret": "db:shop:root"}, "pool": "pool1", "ttl": 600}, "data": {}}
JSON
fi
cat <<TEXT
Mayfly is up. For example:

  export MAYFLY_ADDRESS=$MAYFLY_ADDRESS MAYFLY_TOKEN_FILE=$PWD/$secrets/root-token
  mayfly status
  mayfly secret read db:shop:reader --ttl 60

Prometheus: http://127.0.0.1:9090   Grafana: http://127.0.0.1:3000 (admin, $PWD/$secrets/grafana-password)
End, in $PWD: docker compose down    With everything in it: docker compose down --volumes; rm -rf $secrets
TEXT
