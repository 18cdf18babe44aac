#!/usr/bin/env bash
# Makes the secrets of ../compose.yaml, once: setup.sh DIR, where DIR is to be the directory `secrets` beside
# this file. The directory is closed; the files in it are readable, as containers have users of their own.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
[ ! -e "${1:?a directory}/definitions.json" ] || exit 0
mkdir -p -m 700 "$1"
cd "$1"
mkdir -p dashboards
random() { openssl rand -hex 24 | tr -d '\n'; }
openssl rand -base64 32 >master-key
random >root-token
random >postgres-password
random >postgres-admin-password
random >grafana-password

# RabbitMQ's users, with passwords: four random bytes, and SHA-256 of them and the password.
hash_of() { { cat salt; printf %s "$1"; } | openssl dgst -sha256 -binary | cat salt - | openssl base64 -A; }
cp "$here/../rabbitmq/definitions.json" definitions.json
for user in mayfly-dispatcher mayfly-engine-pool1 mayfly-monitoring; do
  openssl rand 4 >salt
  password=$(random)
  sed -i "/\"name\": \"$user\"/s|\"password_hash\": \"\"|\"password_hash\": \"$(hash_of "$password")\"|" definitions.json
  case $user in
    mayfly-dispatcher) file=dispatcher-amqp-url ;;
    mayfly-engine-*) file=engine-amqp-url ;;
    *) file=monitoring-amqp-url ;;
  esac
  echo "amqp://$user:$password@rabbitmq:5672/mayfly" >$file
done
rm salt

cp "$here/../../helm/mayfly/files/dashboards/mayfly.json" dashboards/
sed 's/__GROUP__/pool1/g; s/__POOL__/pool1/g' "$here/../../helm/mayfly/files/dashboards/engines.json" >dashboards/engines.json
chmod 444 ./*.json ./*-url ./*-password master-key root-token dashboards/*
