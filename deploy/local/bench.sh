#!/usr/bin/env bash
# Runs the benchmark on private servers and writes table.md, bench.json and bench.svg into a directory.
#   bench.sh DIR COMMAND…
# BENCH_* of tests/bench/main.rs choose the rows. BENCH_FSYNC=off: PostgreSQL does not wait for the disk.
# With MAYFLY_WRITE=1 the results replace those in docs/.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/lib.sh"
mkdir -p "${1:?a directory}"
out=$(cd "$1" && pwd)
shift
export BENCH_OUT=$out MAYFLY_PG_FSYNC=${BENCH_FSYNC:-on}
say "installing OpenBao …"
BENCH_OPENBAO=$("$here/openbao.sh" "$out/openbao" | tail -n 1)
export BENCH_OPENBAO
[ -x "$BENCH_OPENBAO" ] || say "no OpenBao, its columns stay empty: $BENCH_OPENBAO"
"$here/with-servers.sh" --pg18 "$@"
say "written: $out/table.md, bench.json and bench.svg"
if [ -n "${MAYFLY_WRITE:-}" ]; then
  docs=$here/../../docs
  install -m 644 "$out/bench.json" "$out/bench.svg" "$docs/"
  python3 - "$docs/capacity.md" "$out/table.md" <<'PY'
import re, sys
document, table = (open(name).read() for name in sys.argv[1:])
begin, end = "<!-- measured -->\n", "<!-- /measured -->"
assert begin in document and end in document, "docs/capacity.md has no place for the table"
head, rest = document.split(begin)
open(sys.argv[1], "w").write(head + begin + "\n" + table + "\n" + end + rest.split(end)[1])
PY
  say "docs/capacity.md, docs/bench.json and docs/bench.svg are written"
fi
