#!/usr/bin/env bash
# Makes the broker users of definitions.json with passwords: one for dispatchers, one for the engines of
# each pool, one for monitoring.
#   users.sh DIR POOL…
# Writes DIR/definitions.json, to be imported (rabbitmqctl import_definitions, or load_definitions), and
# for each user DIR/dispatcher-amqp-url, DIR/engine-POOL-amqp-url or DIR/monitoring-password. To add a pool, run it
# again with the names of all pools: existing passwords are kept.
#   MAYFLY_BROKER=rabbitmq:5672   host and port in the URLs
#   MAYFLY_BROKER_SCHEME=amqp     or amqps
#   MAYFLY_VHOST=mayfly           the virtual host; `/` is written %2f in the URLs
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
[ $# -ge 2 ] || { echo "usage: users.sh DIR POOL…" >&2; exit 2; }
umask 077
mkdir -p "$1"
cd "$1"
shift
vhost=${MAYFLY_VHOST:-mayfly}
[[ $vhost =~ ^[A-Za-z0-9_/.-]+$ ]] || { echo "MAYFLY_VHOST: letters, digits, _ / . and - only" >&2; exit 2; }
for pool; do
  [[ $pool =~ ^[a-z0-9_-]{1,63}$ ]] || { echo "a pool's name is 1 to 63 of a-z, 0-9, _ and -: $pool" >&2; exit 2; }
done

# RabbitMQ's hash: four random bytes, and SHA-256 of them and the password.
hash_of() {
  openssl rand 4 >salt
  { cat salt; printf %s "$1"; } | openssl dgst -sha256 -binary | cat salt - | openssl base64 -A
  rm salt
}

awk -v pools="$*" -v vhost="$vhost" '
  BEGIN { n = split(pools, pool, " ") }
  { gsub(/"vhost": "mayfly"/, "\"vhost\": \"" vhost "\""); gsub(/\{"name": "mayfly"\}/, "{\"name\": \"" vhost "\"}") }
  !/pool1/ { print; next }
  { for (i = 1; i <= n; i++) { line = $0; gsub(/pool1/, pool[i], line); print line } }
' "$here/definitions.json" >definitions.new

# set_password USER FILE: sets the password in FILE, or makes a new one and writes it there.
set_password() {
  local user=$1 file=$2 password
  if [ ! -s "$file" ]; then
    password=$(openssl rand -hex 24)
    case $file in
      *-amqp-url) echo "${MAYFLY_BROKER_SCHEME:-amqp}://$user:$password@${MAYFLY_BROKER:-rabbitmq:5672}/${vhost//\//%2f}" ;;
      *) echo "$password" ;;
    esac >"$file"
  fi
  # With another virtual host than before, users and URLs would not match.
  case $file in *-amqp-url)
    if [[ $(<"$file") != */"${vhost//\//%2f}" ]]; then
      echo "$file is for another virtual host than $vhost: set MAYFLY_VHOST as before, or use another directory" >&2
      exit 2
    fi ;;
  esac
  password=$(sed 's|^amqps\{0,1\}://[^:]*:\([^@]*\)@.*|\1|' "$file")
  sed -i "/\"name\": \"$user\"/s|\"password_hash\": \"\"|\"password_hash\": \"$(hash_of "$password")\"|" definitions.new
}
set_password mayfly-dispatcher dispatcher-amqp-url
set_password mayfly-monitoring monitoring-password
for pool; do set_password "mayfly-engine-$pool" "engine-$pool-amqp-url"; done
mv definitions.new definitions.json
