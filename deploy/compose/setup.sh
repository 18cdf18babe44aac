#!/usr/bin/env bash
# Makes the secrets of ../compose.yaml, once: setup.sh DIR. For compose.yaml, DIR is the directory `secrets` next to
# this file. Others cannot enter DIR. Mayfly's containers read DIR/dispatcher and DIR/engine (mode 0400), which up.sh
# gives to their user. The other files are readable for everybody inside DIR, because other containers have other users.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
[ ! -e "${1:?a directory}/definitions.json" ] || exit 0
umask 077
mkdir -p -m 700 "$1"
cd "$1"
mkdir -p -m 755 dashboards dispatcher engine
random() { openssl rand -hex 24 | tr -d '\n'; }
openssl rand -base64 32 >dispatcher/master-key
random >root-token
cp root-token dispatcher/root-token
random >postgres-password
random >postgres-admin-password
random >grafana-password

# RabbitMQ's users, with passwords.
"$here/../rabbitmq/users.sh" users pool1
mv users/dispatcher-amqp-url dispatcher/amqp-url
mv users/engine-pool1-amqp-url engine/amqp-url
mv users/definitions.json .

cp "$here/../../helm/mayfly/files/dashboards/mayfly.json" dashboards/
cp "$here/../../helm/mayfly/files/dashboards/engines.json" dashboards/
chmod 400 dispatcher/* engine/*
chmod 444 ./*.json ./*-password dashboards/*
