#!/usr/bin/env bash
# A private RabbitMQ node in a directory of its own, on loopback.
#   rabbitmq.sh start DIR      writes DIR/amqp-url; on an existing DIR starts the same node again
#   rabbitmq.sh stop DIR       ends it in order
#   rabbitmq.sh kill DIR       SIGKILL: a crash; `start` recovers it
#   rabbitmq.sh pid DIR        the process
#   rabbitmq.sh ctl DIR ARGS…  rabbitmqctl on it
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/lib.sh"
verb=${1:?start, stop, kill, pid or ctl}
mkdir -p "${2:?a directory}"
dir=$(cd "$2" && pwd)
bin=/usr/lib/rabbitmq/bin
pid() { cat "$dir/pid" 2>/dev/null || true; }

choose_ports() {
  { echo "amqp=$(free_port)"; echo "dist=$(free_port)"; echo "epmd=$(free_port)"; } >"$dir/ports"
}

environment() {
  . "$dir/ports"
  export HOME=$dir ERL_EPMD_PORT=$epmd ERL_EPMD_ADDRESS=127.0.0.1
  export RABBITMQ_NODENAME=mayfly-$amqp@localhost RABBITMQ_NODE_IP_ADDRESS=127.0.0.1
  export RABBITMQ_NODE_PORT=$amqp RABBITMQ_DIST_PORT=$dist RABBITMQ_PID_FILE=$dir/pid
  export RABBITMQ_MNESIA_BASE=$dir/data RABBITMQ_LOG_BASE=$dir/log
  export RABBITMQ_CONF_ENV_FILE=/dev/null RABBITMQ_CONFIG_FILE=$dir/rabbitmq.conf
  export RABBITMQ_ADVANCED_CONFIG_FILE=$dir/advanced.config
  export RABBITMQ_ENABLED_PLUGINS_FILE=$dir/plugins RABBITMQ_GENERATED_CONFIG_DIR=$dir/config
  # No busy waiting: the cores are for others too.
  export RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS="-kernel inet_dist_use_interface {127,0,0,1} +S 2:2 +sbwt none +sbwtdcpu none +sbwtdio none"
  export RABBITMQ_CTL_ERL_ARGS="+sbwt none"
}

launch() {
  environment
  setsid "$bin/rabbitmq-server" >"$dir/log/console" 2>&1 </dev/null &
  local launched=$!
  for _ in $(seq 1200); do
    if open_port "$amqp" && [ -s "$dir/pid" ]; then return 0; fi
    alive "$launched" || return 1
    sleep 0.05
  done
  kill -9 "$launched" 2>/dev/null || true
  return 1
}

stop_epmd() { epmd -port "$epmd" -kill >/dev/null 2>&1 || true; }

case $verb in
  start)
    ours "$(pid)" "$dir" && exit 0
    mkdir -p "$dir/data" "$dir/log" "$dir/config"
    chmod 700 "$dir"
    cp "$here/advanced.config" "$dir/advanced.config"
    echo '[].' >"$dir/plugins"
    if [ -e "$dir/ports" ]; then
      rm -f "$dir/pid"
      launch || { tail -n 20 "$dir/log/console" >&2; die "RabbitMQ did not start again"; }
      exit 0
    fi
    umask 077
    [ -e "$dir/.erlang.cookie" ] || { random_text >"$dir/.erlang.cookie"; chmod 400 "$dir/.erlang.cookie"; }
    password=$(random_text)
    cat >"$dir/rabbitmq.conf" <<CONF
default_user = mayfly
default_pass = $password
loopback_users = none
vm_memory_high_watermark.absolute = 1GB
disk_free_limit.absolute = 50MB
log.console = false
log.file.level = warning
CONF
    for _ in 1 2 3; do
      choose_ports
      if launch; then
        echo "amqp://mayfly:$password@127.0.0.1:$amqp/%2f" >"$dir/amqp-url"
        exit 0
      fi
      stop_epmd
      rm -rf "$dir/data" "$dir/pid"
      mkdir -p "$dir/data"
    done
    tail -n 20 "$dir/log/console" >&2
    die "RabbitMQ did not start"
    ;;
  stop)
    [ -e "$dir/ports" ] || exit 0
    environment
    running=$(pid)
    if ours "$running" "$dir"; then
      kill -TERM "$running" 2>/dev/null || true
      wait_gone "$running" 30 || kill -9 "$running" 2>/dev/null || true
      wait_gone "$running" 5 || die "RabbitMQ does not end"
    fi
    stop_epmd
    rm -f "$dir/pid"
    ;;
  kill)
    running=$(pid)
    ours "$running" "$dir" || exit 0
    kill -9 "$running"
    wait_gone "$running" 5 || die "RabbitMQ does not end"
    rm -f "$dir/pid"
    ;;
  pid) pid ;;
  ctl)
    environment
    shift 2
    exec "$bin/rabbitmqctl" "$@"
    ;;
  *) die "unknown: $verb" ;;
esac
