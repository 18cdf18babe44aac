# Shared by the scripts here: messages, free ports, waiting. Sourced, not run.

say() { printf '%s\n' "$*" >&2; }
die() {
  say "error: $*"
  exit 1
}

# Ports below the range that the kernel assigns by itself.
free_port() {
  local port
  for _ in $(seq 100); do
    port=$((20000 + (RANDOM * 32768 + RANDOM) % 12000))
    if ! (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
      echo "$port"
      return
    fi
  done
  die "no free port found"
}

# open_port PORT: whether a program listens there.
open_port() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

random_text() { od -An -N16 -tx1 /dev/urandom | tr -d ' \n'; }

# alive PID: running, and not a zombie.
alive() {
  [ -n "${1:-}" ] && [ -r "/proc/$1/stat" ] || return 1
  local stat
  stat=$(cat "/proc/$1/stat" 2>/dev/null) || return 1
  stat=${stat##*) }
  [ "${stat%% *}" != Z ]
}

# wait_gone PID SECONDS
wait_gone() {
  for _ in $(seq $(($2 * 20))); do
    alive "$1" || return 0
    sleep 0.05
  done
  return 1
}

# ours PID DIR: alive, and started with DIR in its command line or environment. Another process may have got the id
# that is in a file.
ours() {
  alive "$1" || return 1
  local told
  told=$({ tr '\0' '\n' <"/proc/$1/cmdline"; tr '\0' '\n' <"/proc/$1/environ"; } 2>/dev/null) || true
  [[ $told == *"$2"* ]]
}
