#!/usr/bin/env bash
# Stops what up.sh started, and removes it.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/system.sh"
place=$root/.run

if [ ! -d "$place/system" ]; then
  rm -rf "$place"
  say "Mayfly is not running."
  exit 0
fi
dir=$(cd -P "$place/system" && pwd)
case ${dir##*/} in mayfly-up.*) ;; *) die "$dir was not made by up.sh" ;; esac
status=0
stop_system || status=1
rm -rf "$dir" "$place"
say "Mayfly is stopped."
exit $status
