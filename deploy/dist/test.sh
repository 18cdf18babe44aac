#!/usr/bin/env bash
# Tests the files that build.sh has made: test.sh DIR
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/../local/lib.sh"
dist=$(cd "${1:?the directory of build.sh}" && pwd)
root=$(cd "$here/../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
chmod 755 "$work"
ok() { echo "dist: $*: ok"; }

(cd "$dist" && sha256sum --check --quiet --strict SHA256SUMS) || die "a SHA-256 sum is wrong"
[ "$(wc -l <"$dist/SHA256SUMS")" = "$(find "$dist" -type f ! -name SHA256SUMS | wc -l)" ] || die "a file has no sum"
ok "$(wc -l <"$dist/SHA256SUMS") files with their sums"

# A second build with another umask, time zone and language, later and in another directory.
(umask 077 && TZ=Pacific/Auckland LC_ALL=C.UTF-8 "$here/build.sh" "$work/again" >/dev/null)
diff "$dist/SHA256SUMS" "$work/again/SHA256SUMS" || die "a second build has other bytes"
ok "the same bytes when packed again"

mkdir "$work/tar"
tar -xzf "$dist"/mayfly-*-linux.tar.gz -C "$work/tar"
for program in mayfly mayfly-dispatcher mayfly-engine; do
  file=("$work"/tar/*/"$program")
  "${file[0]}" --version | grep -x "$program [0-9.]*" >/dev/null || die "$program: --version"
  ! readelf -lW "${file[0]}" | grep INTERP >/dev/null || die "$program needs a loader: it is not static"
  for path in "$root" "${CARGO_HOME:-$HOME/.cargo}"; do
    ! grep -qaF "$path/" "${file[0]}" || die "$program holds a path of this machine: $(strings "${file[0]}" | grep -F -m 1 "$path/")"
  done
done
ok "static programs without a path of this machine"

# Installs the packages in a separate root directory, and removes them.
mkdir -p "$work/root/var/lib/dpkg/updates" "$work/root/var/lib/dpkg/info"
touch "$work/root/var/lib/dpkg/status" "$work/root/var/lib/dpkg/available"
package() { dpkg --log=/dev/null --force-not-root --force-script-chrootless --root="$work/root" "$@" >/dev/null; }
package --install "$dist"/*.deb || die "the packages cannot be installed"
for program in mayfly mayfly-dispatcher mayfly-engine; do
  "$work/root/usr/bin/$program" --version >/dev/null || die "/usr/bin/$program: --version"
  zcat "$work/root/usr/share/doc/$program/THIRD-PARTY.gz" | grep -c '^rustls ' >/dev/null || die "$program: the licences are absent"
done
for page in mayfly mayfly-secret-read mayfly-agent; do
  zcat "$work/root/usr/share/man/man1/$page.1.gz" | grep -q '^\.TH ' || die "there is no manual page $page(1)"
done
# systemd needs the programs at their paths, and an instance of each template.
mkdir "$work/units"
for unit in "$root"/deploy/systemd/*.{service,timer}; do
  [ -e "$unit" ] || continue
  name=$(basename "$unit")
  packed=$work/root/usr/lib/systemd/system/$name
  [ -s "$packed" ] || die "$name is in no package"
  ! grep /usr/local "$packed" || die "$name: it starts a program in /usr/local"
  sed "s|=/usr/bin/|=$work/root/usr/bin/|" "$packed" >"$work/units/${name/@./@orders.}"
done
said=$(systemd-analyze verify "$work"/units/* 2>&1) || die "systemd-analyze: $said"
[ -z "$(grep -F mayfly <<<"$said" || true)" ] || die "systemd-analyze: $said"
echo '# mine' >>"$work/root/etc/mayfly/engine.toml"
package --install --force-confold "$dist"/mayfly-engine_*.deb
grep -q '# mine' "$work/root/etc/mayfly/engine.toml" || die "an upgrade overwrites settings"
package --purge mayfly mayfly-dispatcher mayfly-engine
left=$(find "$work/root" -path "$work/root/var/lib/dpkg" -prune -o -type f -print)
[ -z "$left" ] || die "a purge leaves these files: $left"
ok "Debian packages with their units"

python3 - "$dist" "$root" <<'PY'
import glob, json, sys, tomllib
dist, root = sys.argv[1:]
lock = {(one["name"], one["version"]) for one in tomllib.load(open(f"{root}/Cargo.lock", "rb"))["package"]}
files = glob.glob(f"{dist}/*.cdx.json")
assert len(files) == 3, files
for file in files:
    bom = json.load(open(file))
    assert bom["bomFormat"] == "CycloneDX" and bom["specVersion"] == "1.6"
    parts = {one["bom-ref"]: one for one in [bom["metadata"]["component"], *bom["components"]]}
    assert len(parts) == len(bom["components"]) + 1, "a part is there twice"
    for part in parts.values():
        assert part["licenses"] and ("purl" not in part or part["type"] == "application" or (part["name"], part["version"]) in lock), part
    for one in bom["dependencies"]:
        assert {one["ref"], *one["dependsOn"]} <= set(parts), one
    names = {part["name"] for part in parts.values()}
    assert {"rustls", "aws-lc-sys", "glibc"} <= names and "proptest" not in names, f"{file}: {names}"
    assert ("lapin" in names) == (bom["metadata"]["component"]["name"] != "mayfly") and ("rusqlite" in names) == ("dispatcher" in file), file
PY
ok "SBOMs of all that is linked in"

for image in "$dist"/*.oci.tar; do
  mkdir "$work/image"
  tar -xf "$image" -C "$work/image"
  (cd "$work/image/blobs/sha256" && for blob in *; do echo "$blob  $blob"; done | sha256sum --check --quiet) || die "$image: a blob does not have its SHA-256 sum"
  [ "$(umoci ls --layout "$work/image" | wc -l)" = 1 ] || die "$image: there is not exactly one image"
  rm -r "$work/image"
done
tools=$("$root/helm/tools.sh")
for helm in helm3 helm4; do
  "$tools/$helm" lint --strict "$dist"/mayfly-chart-*.tgz --values "$root/helm/mayfly/ci/single-values.yaml" >/dev/null || die "$helm: the chart"
done
ok "images and the chart"

# The targets that the workflow runs are in the Makefile.
grep -ohE '\bmake [a-z-]+' "$root"/.github/workflows/*.yml | sort -u | while read -r _ target; do
  make -n -C "$root" "$target" >/dev/null 2>&1 || die "the workflow runs make $target, which does not exist"
done
ok "the workflow's targets"
