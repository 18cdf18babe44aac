#!/usr/bin/env bash
# Shows the main job on real servers: accounts that work, an engine that is killed, and every account gone at its
# TTL. Starts everything, checks every claim, and stops what it has started. The exit status is not 0 if a check
# fails. MAYFLY_PROFILE=release for the optimized build.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/system.sh"

ttl=15          # seconds that each account lives
reads=5         # before an engine is killed; one more follows
late_limit=5000 # ms an account may outlive its TTL

if [ -t 1 ] && [ -z "${NO_COLOR:-}" ] && [ "${TERM:-dumb}" != dumb ]; then
  terminal=yes bold=$'\e[1m' dim=$'\e[2m' green=$'\e[32m' red=$'\e[31m' plain=$'\e[0m'
else
  terminal='' bold='' dim='' green='' red='' plain=''
fi
title() { printf '\n%s%s%s\n' "$bold" "$*" "$plain"; }
note() { printf '  %s\n' "$*"; }
command_line() { printf '  %s$ %s%s\n' "$dim" "$*" "$plain"; }
typed() { command_line "$@"; "$@" >/dev/null; }

# check WHAT COMMAND…: counts the check, and prints it if it fails. `tell` also prints it if it holds.
checks=0 failures=()
check() {
  local what=$1
  shift
  checks=$((checks + 1))
  if "$@"; then return 0; fi
  failures+=("$what")
  printf '  %s✗ %s%s\n' "$red" "$what" "$plain"
}
tell() {
  local before=${#failures[@]}
  check "$@"
  if [ ${#failures[@]} = "$before" ]; then printf '  %s✓%s %s\n' "$green" "$plain" "$1"; fi
}

now() { date +%s%3N; }
seconds() { printf '%d.%02d s' $(($1 / 1000)) $(($1 % 1000 / 10)); }
# field NAME JSON: a value without quotes or commas, from JSON with one member on a line.
field() { sed -n "s/^ *\"$1\": \"\{0,1\}\([^\",]*\)\"\{0,1\},\{0,1\}$/\1/p" <<<"$2" | head -n 1; }

# The accounts, by number.
user=() password=() lease=() end=() maker=() took=()

read_account() {
  local answer begun
  begun=$(now)
  answer=$(mayfly secret read db:postgresql:dyn1 --ttl $ttl) || return 1
  took+=($(($(now) - begun)))
  user+=("$(field username "$answer")")
  password+=("$(field password "$answer")")
  lease+=("$(field leaseId "$answer")")
  end+=("$(date -d "$(field expiration "$answer")" +%s%3N)")
  maker+=("$(mayfly lease show "${lease[-1]}" -f engine)")
}
# as NUMBER STATEMENT
as() { sql "${user[$1]}" "${password[$1]}" -c "$2"; }
logs_in() { [ "$(as "$1" 'SELECT current_user')" = "${user[$1]}" ]; }
can_select() { [ "$(as "$1" 'SELECT count(*) FROM invoices')" = 3 ]; }
# 42501: insufficient_privilege
cannot_insert() { [[ $(as "$1" "INSERT INTO invoices VALUES (4, 'Mallory', 1)" 2>&1) == *42501* ]]; }
# The admin's login distinguishes a refusal from a server that is unreachable.
is_refused() {
  local status=0
  as "$1" 'SELECT 1' >/dev/null 2>&1 || status=$?
  [ $status = 2 ] && [ "$(admin_sql -c 'SELECT 1')" = 1 ]
}
role_count() { admin_sql -c "SELECT count(*) FROM pg_roles WHERE rolname IN ($(printf "'%s'," "$@")'')"; }
role_is_gone() { [ "$(role_count "${user[$1]}")" = 0 ]; }
is_revoked() { [ "$(mayfly lease show "${lease[$1]}" -f state)" = revoked ]; }
is_live() { [ "$1" != "$victim" ] && [[ " ${engines[*]} " == *" $1 "* ]]; }
# tally NAME…: `engine-a 2, engine-b 3`
tally() { printf '%s\n' "$@" | sort | uniq -c | awk '{ printf "%s%s %s", (NR > 1 ? ", " : ""), $2, $1 }'; }

show_account() {
  local n=$1 before=${#failures[@]}
  check "account $((n + 1)): made by an engine of the pool" test -n "$(grep -xF -- "${maker[n]}" <(printf '%s\n' "${engines[@]}"))"
  check "account $((n + 1)): SELECT works" can_select "$n"
  check "account $((n + 1)): INSERT is refused" cannot_insert "$n"
  [ ${#failures[@]} != "$before" ] ||
    printf '  %-3s %-32s %-11s %6s    3 rows    refused\n' $((n + 1)) "${user[n]}" "${maker[n]}" "${took[n]} ms"
}

# progress FROM TO ACCOUNTS: a bar on a terminal, else a line from time to time.
progress() {
  local at left width=32 filled bar
  at=$(now)
  left=$(($2 > at ? $2 - at : 0))
  if [ -n "$terminal" ]; then
    filled=$((at < $2 ? width * (at - $1) / ($2 - $1) : width))
    printf -v bar '%*s' "$filled" ''
    printf '\r\e[K  %s%s%s%s  %2d s to the last TTL, %d accounts left' "$green" "${bar// /━}" "$plain$dim" \
      "$(printf '%*s' $((width - filled)) '' | sed 's/ /─/g')$plain" $(((left + 999) / 1000)) "$3"
  elif [ "$at" -ge "${next_line:-0}" ]; then
    note "$(((left + 999) / 1000)) s to the last TTL, $3 accounts left"
    next_line=$((at + 3000))
  fi
}
end_progress() { if [ -n "$terminal" ]; then printf '\r\e[K'; fi; }

dir=
# A second call changes nothing. If a check has failed, the logs are shown.
stop_all() {
  [ -n "$dir" ] || return 0
  local status=0 left log
  stop_system || status=1
  left=$(leftovers)
  if [ -n "$left" ]; then
    kill -9 $left 2>/dev/null || true
    status=1
  fi
  if [ ${#failures[@]} -gt 0 ] || [ "${1:-0}" = 1 ]; then
    for log in "$dir"/log/*; do
      [ -s "$log" ] || continue
      say "--- end of the log of ${log##*/}"
      tail -n 8 "$log" >&2
    done
  fi
  cd /
  rm -rf "$dir"
  dir=
  return $status
}
interrupted() {
  local status=$?
  trap - EXIT
  trap '' INT TERM HUP
  stop_all "$status" || true
  exit "$status"
}
trap interrupted EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
trap 'exit 129' HUP

title "Setting up"
note "what is missing is installed, and Mayfly is built"
"$here/install.sh"
build
new_directory mayfly-demo
note "RabbitMQ and PostgreSQL, private ones on free loopback ports"
start_servers
fill_database
note "a dispatcher, and the engines ${engines[*]}"
start_dispatcher
create_pool
start_engines

title "Two secrets: the admin's connection, and what is made of it"
write_bodies
sed "s/^/  $dim/; s/$/$plain/" "$dir/root.json"
create_secret root root.json
sed "s/^/  $dim/; s/$/$plain/" "$dir/dyn1.json"
create_secret dyn1 dyn1.json

title "Every read makes an account, for $ttl seconds"
command_line "mayfly secret read db:postgresql:dyn1 --ttl $ttl"
printf '  %s%-3s %-32s %-11s %9s    SELECT    INSERT%s\n' "$dim" '' account 'made by' took "$plain"
for ((n = 0; n < reads; n++)); do
  read_account || die "a read failed"
  show_account "$n"
done

title "One engine dies"
mayfly -e table engine list | sed 's/^/  /'
victim=${maker[0]}
victim_pid=$(pid_of "$victim")
command_line "kill -9 $victim_pid     # $victim, which made account 1"
kill -9 "$victim_pid"
wait_gone "$victim_pid" 5 || die "$victim still runs after SIGKILL"
tell "account 1 works without the engine that made it" logs_in 0
as 0 'SELECT pg_sleep(600)' >/dev/null 2>&1 & session=$!
note "(it now holds a session open, too)"
read_account || die "no account without $victim"
tell "another read is served, by ${maker[-1]}" is_live "${maker[-1]}"
show_account $((${#lease[@]} - 1))

title "Until the TTL"
all=${!lease[*]} from=$(now) early=
first_end=${end[0]} last_end=${end[-1]}
while left=$(role_count "${user[@]}"); do
  at=$(now)
  progress "$from" "$last_end" "$left"
  if [ -z "$early" ] && [ "$at" -ge $((first_end - 2500)) ]; then
    early=yes
    end_progress
    tell "$(seconds $((first_end - at))) before its end account 1 still works" logs_in 0
  fi
  if [ "$left" = 0 ] || [ "$at" -gt $((last_end + late_limit + 5000)) ]; then break; fi
  sleep 0.2
done
end_progress

title "After the TTL"
printf '  %s%-3s %-32s %-11s %9s    login     role%s\n' "$dim" '' account 'revoked by' late "$plain"
revokers=() lates=()
for n in $all; do
  name="account $((n + 1))" before=${#failures[@]}
  check "$name: the login is refused" is_refused "$n"
  check "$name: the role is gone" role_is_gone "$n"
  check "$name: its lease is revoked" eventually 10 is_revoked "$n"
  shown=$(mayfly lease show "${lease[n]}")
  revoker=$(field revokedBy "$shown")
  check "$name: revoked by a live engine (by $revoker)" is_live "$revoker"
  revoked_at=$(date -d "$(field revokedAt "$shown")" +%s%3N 2>/dev/null) || revoked_at=0
  late=$((revoked_at - end[n]))
  # The API answers in whole seconds.
  check "$name: not before its TTL, and at most $((late_limit / 1000)) s after it ($((late / 1000)) s)" \
    test "$late" -ge 0 -a "$late" -le $late_limit
  revokers+=("$revoker") lates+=("$late")
  [ ${#failures[@]} != "$before" ] ||
    printf '  %-3s %-32s %-11s %9s    refused   gone\n' $((n + 1)) "${user[n]}" "$revoker" "$((late / 1000)) s"
done
tell "the session that was open is ended" wait_gone "$session" 5
tell "nobody has written to the table" test "$(admin_sql -c 'SELECT count(*) FROM invoices')" = 3

title "Stopping what was started"
tell "everything ended by itself; no process and no file is left" stop_all
trap - EXIT

sorted_took=($(printf '%s\n' "${took[@]}" | sort -n))
sorted_late=($(printf '%s\n' "${lates[@]}" | sort -n))
title "Summary"
note "Made     ${#lease[@]} accounts, for $ttl s each, by $(tally "${maker[@]}"); a read took ${sorted_took[${#took[@]} / 2]} ms (median)"
note "Killed   $victim with SIGKILL, the maker of $(printf '%s\n' "${maker[@]}" | grep -cxF "$victim") of them; the others went on"
note "Revoked  by $(tally "${revokers[@]}"); $((sorted_late[0] / 1000)) to $((sorted_late[-1] / 1000)) s after the TTL"
if [ ${#failures[@]} = 0 ]; then
  note "Each     could SELECT and not INSERT; now every login is refused and every role gone"
  note "${green}All $checks checks hold.$plain"
else
  note "$red${#failures[@]} of $checks checks do not hold:$plain"
  for failure in "${failures[@]}"; do note "  $failure"; done
  exit 1
fi
