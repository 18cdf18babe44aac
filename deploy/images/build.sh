#!/usr/bin/env bash
# Builds the images of Dockerfile without a container engine, as OCI layouts: build.sh DIR
# Then, for example: skopeo copy oci:DIR/mayfly-engine:0.1.0 docker://registry.example.com/mayfly-engine:0.1.0
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/../local/lib.sh"
mkdir -p "${1:?a directory}"
to=$(cd "$1" && pwd)
certificates=/etc/ssl/certs/ca-certificates.crt
missing=()
command -v umoci >/dev/null || missing+=(umoci)
[ -s $certificates ] || missing+=(ca-certificates)
if [ ${#missing[@]} -gt 0 ]; then
  say "installing ${missing[*]} …"
  { apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends "${missing[@]}"; } >/dev/null ||
    die "apt-get could not install ${missing[*]}"
fi

work=$(mktemp -d "$to/work.XXXXXX")
trap 'rm -rf "$work"' EXIT
"$here/compile.sh" "$work/programs"
version=$("$work/programs/mayfly" --version)
version=${version##* }
# The same source makes the same bytes.
moment=${SOURCE_DATE_EPOCH:-$(git -C "$here" log -1 --format=%ct 2>/dev/null || echo 0)}
# settings_of PROGRAM: the settings of its image in the Dockerfile, as arguments of umoci, one on each line.
settings_of() {
  awk -v program="$1" '
    function say(option, value) { print "--config." option "\n" value }
    $1 == "FROM" { ours = $NF == "base" || $NF == program; next }
    !ours || /^(#.*)?$/ || $1 == "COPY" { next }
    $1 == "USER" { say("user", $2); next }
    $1 == "WORKDIR" { say("workingdir", $2); next }
    $1 == "ENV" { say("env", $2); next }
    $1 == "EXPOSE" { for (i = 2; i <= NF; i++) say("exposedports", $i "/tcp"); next }
    $1 == "ENTRYPOINT" { gsub(/[^a-z\/-]/, "", $2); say("entrypoint", $2); next }
    { exit 1 }
  ' "$here/Dockerfile"
}
for program in mayfly-dispatcher mayfly-engine mayfly; do
  layout=$work/$program rootfs=$work/bundle-$program/rootfs
  umoci init --layout "$layout"
  umoci new --image "$layout:$version"
  umoci unpack --image "$layout:$version" "$work/bundle-$program" >/dev/null
  install -D -m 644 $certificates "$rootfs$certificates"
  install -m 755 "$work/programs/$program" "$rootfs/$program"
  if [ $program = mayfly-dispatcher ]; then
    # A new volume that is mounted here gets this user.
    install -d "$rootfs/var/lib"
    install -d -m 700 -o 65532 -g 65532 "$rootfs/var/lib/mayfly"
  fi
  find "$rootfs" -exec touch -h -d "@$moment" {} +
  umoci repack --image "$layout:$version" --history.created="$(date -u -d "@$moment" +%FT%TZ)" \
    --history.created_by="make images" "$work/bundle-$program" >/dev/null
  told=$(settings_of $program) || die "build.sh does not know an instruction of the Dockerfile"
  mapfile -t settings <<<"$told"
  umoci config --image "$layout:$version" --created "$(date -u -d "@$moment" +%FT%TZ)" \
    --no-history --author Mayfly "${settings[@]}"
  umoci gc --layout "$layout" >/dev/null
  rm -rf "${to:?}/$program"
  mv -T "$layout" "$to/$program"
  printf '%-18s %s:%s  %s\n' "$program" "$to/$program" "$version" "$(du -sh --apparent-size "$to/$program" | cut -f1)"
done
