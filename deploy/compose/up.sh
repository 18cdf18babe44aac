#!/usr/bin/env bash
# Starts ../compose.yaml from nothing: secrets, the broker and a dispatcher, a pool and its key, the other containers,
# and two secrets. A second run changes nothing. tests/compose runs it.
set -euo pipefail
cd "$(dirname "$0")/.."
compose/setup.sh compose/secrets
secrets=compose/secrets
version=${MAYFLY_VERSION:-0.1.0}
MAYFLY_ADDRESS=http://127.0.0.1:8470 MAYFLY_TOKEN=$(cat $secrets/root-token)
export MAYFLY_ADDRESS MAYFLY_TOKEN
# Runs the command line in its image. The token is in the environment, not in the process list.
mayfly() { docker run --rm -i --network host -e MAYFLY_ADDRESS -e MAYFLY_TOKEN "mayfly:$version" "$@"; }

# keep DIRECTORY: gives its files to the user of Mayfly's containers. A user of Docker may do that.
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
  # The image's server has no TLS, and the network to it is on this machine. For any other server omit sslmode (then
  # it is `require`), or verify the server's name with `verify-full`.
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
Mayfly is running. For example:

  export MAYFLY_ADDRESS=$MAYFLY_ADDRESS MAYFLY_TOKEN_FILE=$PWD/$secrets/root-token
  mayfly status
  mayfly secret read db:shop:reader --ttl 60

Prometheus: http://127.0.0.1:9090   Grafana: http://127.0.0.1:3000 (admin, $PWD/$secrets/grafana-password)
Stop it, in $PWD: docker compose down    Delete all data too: docker compose down --volumes; rm -rf $secrets
TEXT
