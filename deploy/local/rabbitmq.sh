#!/usr/bin/env bash
# A private RabbitMQ node in a directory of its own, on loopback.
#   rabbitmq.sh start DIR      writes DIR/amqp-url; on an existing DIR starts the same node again.
#     MAYFLY_RABBITMQ=4: release 4 (install.sh --for-tests) instead of Debian's own
#     MAYFLY_RABBITMQ_JOIN=DIR: as a member of the cluster of that node
#     MAYFLY_RABBITMQ_BESIDE=DIR: with the cookie and the port mapper of that node, so that its `shell` can serve both
#     MAYFLY_RABBITMQ_TLS=1: TLS only, with a certificate of an authority of its own, DIR/ca.pem; =client: and
#       only for clients with a certificate of it (DIR/ca.key), by which they may log in
#     MAYFLY_RABBITMQ_MANAGEMENT=1: with the management API, whose URL is in DIR/management-url
#   rabbitmq.sh stop DIR       shuts it down
#   rabbitmq.sh kill DIR       SIGKILL: a crash; `start` recovers it
#   rabbitmq.sh pid DIR        the process
#   rabbitmq.sh ctl DIR ARGS…  rabbitmqctl on it
#   rabbitmq.sh shell DIR      evaluates each line of its input, as `rabbitmqctl eval` does. A line is the name of a
#     node (in DIR/node), a space and an expression. The node is that of DIR, or beside it. The answer is one line: `ok`
#     or `error`, a space, and the value in base64. A start of rabbitmqctl costs half a second of a core
set -euo pipefail
# The caller's umask does not count: servers run as other users.
umask 022
here=$(cd "$(dirname "$0")" && pwd)
. "$here/lib.sh"
verb=${1:?start, stop, kill, pid, ctl or shell}
mkdir -p "${2:?a directory}"
dir=$(cd "$2" && pwd)
bin=/usr/lib/rabbitmq/bin
root_of_4=${MAYFLY_CACHE:-/var/cache/mayfly}/rabbitmq-4
pid() { cat "$dir/pid" 2>/dev/null || true; }

# The Erlang name of the node of a directory.
name_of() { (. "$1/ports"; echo "mayfly-$amqp@localhost"); }

choose_ports() {
  local known
  known=$([ -z "$1" ] || . "$1/ports"; echo "${epmd:-$(free_port)}")
  { echo "amqp=$(free_port)"; echo "dist=$(free_port)"; echo "epmd=$known"; } >"$dir/ports"
  name_of "$dir" >"$dir/node"
}

# Runs one of RabbitMQ's programs; release 4 in its own Debian, mounted for that process alone.
program() {
  local name=$1
  shift
  if [ "$(cat "$dir/release" 2>/dev/null)" != 4 ]; then exec "$bin/$name" "$@"; fi
  mkdir -p "$root_of_4$dir"
  exec unshare --mount --propagation private bash -c '
    root=$1 dir=$2
    shift 2
    mount --rbind /dev "$root/dev" && mount -t proc proc "$root/proc" &&
      mount --bind "$dir" "$root$dir" && exec chroot "$root" "$@"' mount "$root_of_4" "$dir" "$bin/$name" "$@"
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
  (export -f program; export dir bin root_of_4; exec setsid bash -c 'program rabbitmq-server') \
    >"$dir/log/console" 2>&1 </dev/null &
  local launched=$!
  for _ in $(seq 1200); do
    if open_port "$amqp" && [ -s "$dir/pid" ]; then return 0; fi
    alive "$launched" || return 1
    sleep 0.05
  done
  kill -9 "$launched" 2>/dev/null || true
  return 1
}

ctl() { (program rabbitmqctl "$@"); }

# tls: an authority, a certificate of it, and the listener; the port is no plain one then.
tls() {
  local made=(openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 30)
  "${made[@]}" -subj '/CN=an authority' -keyout "$dir/ca.key" -out "$dir/ca.pem" 2>/dev/null
  "${made[@]}" -subj /CN=localhost -addext subjectAltName=DNS:localhost,IP:127.0.0.1 \
    -addext basicConstraints=critical,CA:FALSE -CA "$dir/ca.pem" -CAkey "$dir/ca.key" \
    -keyout "$dir/server.key" -out "$dir/server.pem" 2>/dev/null
  cat <<CONF
listeners.tcp = none
listeners.ssl.1 = 127.0.0.1:$(. "$dir/ports"; echo "$amqp")
ssl_options.cacertfile = $dir/ca.pem
ssl_options.certfile = $dir/server.pem
ssl_options.keyfile = $dir/server.key
CONF
  if [ "$MAYFLY_RABBITMQ_TLS" = client ]; then
    cat <<CONF
ssl_options.verify = verify_peer
ssl_options.fail_if_no_peer_cert = true
ssl_cert_login_from = common_name
auth_mechanisms.1 = PLAIN
auth_mechanisms.2 = EXTERNAL
CONF
  else
    echo 'ssl_options.verify = verify_none'
  fi
}

# The plugins of a node that is new.
plugins() {
  local wanted=()
  [ "${MAYFLY_RABBITMQ_TLS:-}" != client ] || wanted+=(rabbitmq_auth_mechanism_ssl)
  [ -z "${MAYFLY_RABBITMQ_MANAGEMENT:-}" ] || wanted+=(rabbitmq_management)
  (IFS=,; echo "[${wanted[*]}].") >"$dir/plugins"
}

# The management API on a port of its own.
management() {
  local port
  port=$(free_port)
  printf 'management.tcp.ip = 127.0.0.1\nmanagement.tcp.port = %s\n' "$port"
  echo "http://mayfly:$password@127.0.0.1:$port/%2f" >"$dir/management-url"
}

join() {
  { ctl -q stop_app && ctl -q join_cluster "$(name_of "$1")" && ctl -q start_app; } >&2
}

# One that other nodes use does not end.
stop_epmd() { epmd -port "$epmd" -kill >/dev/null 2>&1 || true; }

case $verb in
  start)
    ours "$(pid)" "$dir" && exit 0
    mkdir -p "$dir/data" "$dir/log" "$dir/config"
    chmod 700 "$dir"
    cp "$here/advanced.config" "$dir/advanced.config"
    [ -e "$dir/plugins" ] || plugins
    if [ -e "$dir/ports" ]; then
      rm -f "$dir/pid"
      launch || { tail -n 20 "$dir/log/console" >&2; die "RabbitMQ did not start again"; }
      exit 0
    fi
    umask 077
    password=$(random_text)
    scheme=${MAYFLY_RABBITMQ_TLS:+s}
    seed=${MAYFLY_RABBITMQ_JOIN:-} beside=${MAYFLY_RABBITMQ_JOIN:-${MAYFLY_RABBITMQ_BESIDE:-}}
    if [ -n "$beside" ]; then
      cp "$beside/.erlang.cookie" "$dir/"
    elif [ ! -e "$dir/.erlang.cookie" ]; then
      random_text >"$dir/.erlang.cookie"
      chmod 400 "$dir/.erlang.cookie"
    fi
    if [ -n "$seed" ]; then
      seed=$(cd "$seed" && pwd)
      password=$(sed 's/.*mayfly:\(.*\)@.*/\1/' "$seed/amqp-url")
    fi
    case ${MAYFLY_RABBITMQ:-} in
      '') ;;
      4) [ -x "$root_of_4$bin/rabbitmq-server" ] || die "no RabbitMQ 4 in $root_of_4; run install.sh --for-tests"
        echo 4 >"$dir/release" ;;
      *) die "MAYFLY_RABBITMQ: 4, or nothing" ;;
    esac
    cat >"$dir/common.conf" <<CONF
default_user = mayfly
default_pass = $password
loopback_users = none
vm_memory_high_watermark.absolute = 1GB
disk_free_limit.absolute = 50MB
net_ticktime = 10
cluster_partition_handling = pause_minority
log.console = false
log.file.level = warning
CONF
    for _ in 1 2 3; do
      choose_ports "$beside"
      {
        cat "$dir/common.conf"
        [ -z "$scheme" ] || tls
        [ -z "${MAYFLY_RABBITMQ_MANAGEMENT:-}" ] || management
      } >"$dir/rabbitmq.conf"
      if launch; then
        [ -z "$seed" ] || join "$seed" || die "RabbitMQ did not join the cluster"
        echo "amqp$scheme://mayfly:$password@127.0.0.1:$amqp/%2f" >"$dir/amqp-url"
        exit 0
      fi
      [ -n "$beside" ] || stop_epmd
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
    [ ! -d "$root_of_4$dir" ] || (cd "$root_of_4" && rmdir -p --ignore-fail-on-non-empty ".$dir")
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
    program rabbitmqctl "$@"
    ;;
  shell)
    environment
    # An idle connection lives only if both ends have the same tick time.
    exec erl -noshell -hidden -sname "shell-$$@localhost" -kernel inet_dist_use_interface '{127,0,0,1}' \
      -kernel net_ticktime 10 +S 1:1 +sbwt none -eval '
        Evaluate = fun(Line) ->
          [Node, Text] = string:split(Line, " "),
          {ok, Tokens, _} = erl_scan:string(Text),
          {ok, Expressions} = erl_parse:parse_exprs(Tokens),
          case rpc:call(list_to_atom(Node), erl_eval, exprs, [Expressions, []], 120000) of
            {value, {text, Value}, _} -> {"ok", Value};
            {value, Value, _} -> {"ok", io_lib:format("~tp", [Value])};
            Other -> {"error", io_lib:format("~tp", [Other])}
          end
        end,
        Loop = fun Loop() ->
          case io:get_line("") of
            eof -> halt(0);
            Line ->
              {Word, Text} = try Evaluate(Line) catch
                Class:Reason -> {"error", io_lib:format("~tp", [{Class, Reason}])}
              end,
              io:put_chars([Word, " ", base64:encode(unicode:characters_to_binary(Text)), "\n"]),
              Loop()
          end
        end,
        Loop().'
    ;;
  *) die "unknown: $verb" ;;
esac
