#!/usr/bin/env bash
# Makes flame graphs of the dispatcher and the engines, by CPU, while they issue 16 leases at a time.
#   flame.sh DIR COMMAND…    COMMAND runs the benchmark
# Needs perf (Debian: linux-perf) and the right to use it. With MAYFLY_WRITE=1 the graphs replace those in docs/.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/lib.sh"
mkdir -p "${1:?a directory}"
out=$(cd "$1" && pwd)
shift
inferno=0.12.5
perf --version >/dev/null 2>&1 || die "no perf; install linux-perf"
[ -x "$out/tools/bin/inferno-flamegraph" ] || cargo install --quiet --locked --root "$out/tools" "inferno@$inferno"
rm -f "$out"/*.perf
export BENCH_FLAME=$out BENCH_OUT=$out/bench BENCH_ROW=issue BENCH_REPEATS=1 BENCH_SECONDS=12
export BENCH_OPENBAO="not measured here"
mkdir -p "$BENCH_OUT"
"$here/with-servers.sh" --pg18 "$@"
for name in dispatcher engines; do
  say "unwinding the stacks of $name …"
  perf script --no-inline -i "$out/$name.perf" 2>/dev/null |
    "$out/tools/bin/inferno-collapse-perf" |
    "$out/tools/bin/inferno-flamegraph" --title "$name: 16 issues in flight, 4096 SCRAM rounds" --minwidth 0.4 --hash \
      >"$out/flame-$name.svg"
  rm "$out/$name.perf"
  say "written: $out/flame-$name.svg"
  [ -z "${MAYFLY_WRITE:-}" ] || install -m 644 "$out/flame-$name.svg" "$here/../../docs/"
done
