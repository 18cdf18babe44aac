#!/usr/bin/env bash
# Holds the dependencies against deny.toml, and looks for those that are not used: deny.sh CHECK…
set -euo pipefail
cd "$(dirname "$0")/../.."
for tool in "${MAYFLY_CACHE:-/var/cache/mayfly}"/cargo/*; do PATH=$tool:$PATH; done
cargo deny check "$@"
cargo shear
