#!/usr/bin/env bash
# Stops what up.sh started, and removes it.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/system.sh"
place=$root/.run

if [ ! -d "$place/system" ]; then
  rm -rf "$place"
  say "Nothing is up."
  exit 0
fi
dir=$(cd -P "$place/system" && pwd)
case ${dir##*/} in mayfly-up.*) ;; *) die "$dir is not what up.sh makes" ;; esac
status=0
stop_system || status=1
rm -rf "$dir" "$place"
say "Mayfly is down."
exit $status
