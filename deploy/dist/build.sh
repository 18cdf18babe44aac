#!/usr/bin/env bash
# Makes the files of a release in a directory: build.sh DIR
#   mayfly-VERSION-ARCH-linux.tar.gz    the programs, static, with manual pages, units and example settings
#   mayfly*_VERSION_ARCH.deb            Debian packages, one for each program
#   mayfly-chart-VERSION.tgz            the Helm chart
#   PROGRAM-VERSION-ARCH.oci.tar        images, as OCI archives
#   PROGRAM-VERSION.cdx.json            the SBOM of each program, in CycloneDX
#   SHA256SUMS
# The same source, compiler and certificates make the same bytes: times are those of the commit, or SOURCE_DATE_EPOCH.
set -euo pipefail
# A distribution never has programs of a debug build.
unset MAYFLY_IMAGES
umask 022
export LC_ALL=C TZ=UTC
here=$(cd "$(dirname "$0")" && pwd)
. "$here/../local/lib.sh"
mkdir -p "${1:?a directory}"
to=$(cd "$1" && pwd)
cd "$here/../.."
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}
export SOURCE_DATE_EPOCH

work=$(mktemp -d "$to/work.XXXXXX")
trap 'rm -rf "$work"' EXIT
mkdir "$work/out"
deploy/images/compile.sh "$work/programs"
version=$("$work/programs/mayfly" --version)
version=${version##* }
machine=$(uname -m)

# packed FILE DIR NAME…: makes a tar of these files. The same files make the same bytes.
packed() {
  tar --create --file "$1" --directory "$2" --sort=name --format=ustar --mtime="@$SOURCE_DATE_EPOCH" --owner=0 --group=0 --numeric-owner "${@:3}"
}

"$here/parts.py" "$version" "$work/out" "$work/notices"

name=mayfly-$version-$machine-linux
mkdir "$work/$name" "$work/$name/systemd" "$work/$name/man1"
install -m 755 "$work/programs"/* "$work/$name/"
install -m 644 LICENSE README.md CHANGELOG.md "$work/notices/THIRD-PARTY" "$work/$name/"
install -m 644 deploy/systemd/* "$work/$name/systemd/"
"$work/programs/mayfly" man "$work/$name/man1"
packed - "$work" "$name" | gzip -9n >"$work/out/$name.tar.gz"

"$here/debian.sh" "$version" "$work/programs" "$work/notices" "$work/out"

# Helm gives the files the current time.
tools=$(helm/tools.sh)
"$tools/helm3" package helm/mayfly --destination "$work" >/dev/null
mkdir "$work/chart"
tar -xzf "$work"/mayfly-*.tgz -C "$work/chart"
packed - "$work/chart" mayfly | gzip -9n >"$work/out/mayfly-chart-$version.tgz"

deploy/images/build.sh "$work/images" >/dev/null
for image in "$work/images"/*; do
  packed "$work/out/$(basename "$image")-$version-$machine.oci.tar" "$image" blobs index.json oci-layout
done

(cd "$work/out" && sha256sum -- * >SHA256SUMS)
find "$to" -mindepth 1 -maxdepth 1 ! -path "$work" -exec rm -rf {} +
mv "$work/out"/* "$to/"
rm -rf "$work"
(cd "$to" && du -h --apparent-size -- *.* SHA256SUMS)
