#!/usr/bin/env bash
# Runs a command of `cargo test`.
#   suite.sh COMMAND…
# With MAYFLY_AGAIN=n, up to n failed tests run a second time, one by one. The output names those that pass then.
# Find their cause; they do not fail the run. CI sets this, so that a busy machine does not refuse a correct change.
# A test that fails twice fails the run.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/lib.sh"
again=${MAYFLY_AGAIN:-0}
if [ "$again" = 0 ]; then exec "$@"; fi

log=$(mktemp "${MAYFLY_TEST_DIR:-/tmp}/suite.XXXXXX")
trap 'rm -f "$log"' EXIT
# A test that never ends must not hold up CI. Its name is then in the last line with "has been running".
timeout --kill-after=30 2400 "$@" 2>&1 | tee "$log"
status=${PIPESTATUS[0]}
[ "$status" -ne 0 ] || exit 0
mapfile -t failed < <(sed -n 's/^test \([a-z0-9_:]*\) \.\.\. FAILED$/\1/p' "$log")
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
