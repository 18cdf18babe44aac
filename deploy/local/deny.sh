#!/usr/bin/env bash
# Checks the dependencies by deny.toml, and finds unused ones: deny.sh CHECK…
set -euo pipefail
cd "$(dirname "$0")/../.."
for tool in "${MAYFLY_CACHE:-/var/cache/mayfly}"/cargo/*; do PATH=$tool:$PATH; done
cargo deny check "$@"
cargo shear
