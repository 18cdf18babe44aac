#!/usr/bin/env bash
# Runs a command of `cargo test` for the end-to-end tests, and prints the slowest of them after it.
#   suite.sh COMMAND…
# With MAYFLY_AGAIN=n, up to n failed tests run a second time, one by one. The output names those that pass then.
# Find their cause; they do not fail the run. CI sets this, so that a busy machine does not refuse a correct change.
# A test that fails twice fails the run.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/lib.sh"
again=${MAYFLY_AGAIN:-0}

log=$(mktemp "${MAYFLY_TEST_DIR:-/tmp}/suite.XXXXXX")
trap 'rm -f "$log"' EXIT

# The test program gives the time of each test only with this variable. Set by the runner, it does not reach the
# compiler, which would build all again.
host=$(rustc -vV | sed -n 's/^host: //p' | tr 'a-z-' 'A-Z_')
export "CARGO_TARGET_${host}_RUNNER=env RUSTC_BOOTSTRAP=1"
# A test that never ends must not hold up CI. Its name is then in the last line with "has been running".
limit=()
[ "$again" = 0 ] || limit=(timeout --kill-after=30 2400)
"${limit[@]}" "$@" -Zunstable-options --report-time 2>&1 | tee "$log" | sed -u 's/ <[0-9.]*s>$//'
status=${PIPESTATUS[0]}

# times: seconds and name of each test, the longest first.
times() { sed -n 's/^test \([a-z0-9_:]*\) \.\.\. [a-zA-Z]* <\([0-9.]*\)s>$/\2 \1/p' "$log" | sort -rn; }
if [ "$(times | wc -l)" -gt 10 ]; then
  say "the slowest tests, in seconds:"
  times | head -n "${MAYFLY_SLOWEST:-20}" >&2
  say "all tests together: $(times | awk '{ sum += $1 } END { printf "%.0f s", sum }')"
fi

[ "$status" -ne 0 ] || exit 0
[ "$again" -ne 0 ] || exit "$status"
mapfile -t failed < <(sed -n 's/^test \([a-z0-9_:]*\) \.\.\. FAILED.*/\1/p' "$log")
count=${#failed[@]}
if [ "$count" -eq 0 ] || [ "$count" -gt "$again" ]; then exit "$status"; fi
# The arguments after `--` are for the test program, which gets the names instead.
command=()
for word in "$@"; do
  [ "$word" != -- ] || break
  command+=("$word")
done
say "$count tests failed; they run again, one by one"
"${command[@]}" -- --test-threads=1 --exact "${failed[@]}" || exit 1
for name in "${failed[@]}"; do say "FLAKY: $name failed once and passed alone"; done
