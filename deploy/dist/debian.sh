#!/usr/bin/env bash
# Packs the programs for Debian: debian.sh VERSION PROGRAMS NOTICES TO
# There are three packages, because a host seldom has both an engine and a dispatcher. The installation starts nothing,
# because the units have no URL of a broker yet.
set -euo pipefail
umask 022
here=$(cd "$(dirname "$0")" && pwd)
version=$1 programs=$2 notices=$3 to=$4
root=$here/../..
arch=$(dpkg --print-architecture)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
chmod 755 "$work"

# package NAME SUMMARY DESCRIPTION: packs $work/NAME, with the files that every package has.
package() {
  local name=$1 dir=$work/$1
  install -D -m 755 "$programs/$name" "$dir/usr/bin/$name"
  install -D -m 644 "$notices/THIRD-PARTY" "$dir/usr/share/doc/$name/THIRD-PARTY"
  gzip -9n "$dir/usr/share/doc/$name/THIRD-PARTY"
  gzip -9nc "$root/CHANGELOG.md" >"$dir/usr/share/doc/$name/changelog.gz"
  {
    printf 'Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/\nUpstream-Name: Mayfly\n\n'
    printf 'Files: *\nCopyright: The authors of Mayfly\nLicense: Apache-2.0\n On Debian the text is in /usr/share/common-licenses/Apache-2.0.\n'
    printf ' The licences of the libraries that are linked in are in THIRD-PARTY.gz.\n'
  } >"$dir/usr/share/doc/$name/copyright"
  mkdir -p "$dir/DEBIAN"
  cat >"$dir/DEBIAN/control" <<TEXT
Package: $name
Version: $version
Architecture: $arch
Section: admin
Priority: optional
Maintainer: The maintainers of Mayfly <maintainers@mayfly.example>
Homepage: https://mayfly.example
Recommends: ca-certificates
Installed-Size: $(du -sk --apparent-size --exclude=DEBIAN "$dir" | cut -f1)
Description: $2
$(printf '%s\n' "$3" | sed 's/^/ /')
TEXT
  (cd "$dir" && find . -path ./DEBIAN -prune -o -type f -printf '%P\0' | sort -z | xargs -0 md5sum >DEBIAN/md5sums)
  find "$dir" -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +
  dpkg-deb --root-owner-group -Zxz --build "$dir" "$to/${name}_${version}_$arch.deb" >/dev/null
}

# service PACKAGE SETTINGS RUNNING UNIT…: adds units and their settings. RUNNING is the pattern of units to restart.
service() {
  local dir=$work/$1 unit
  install -d "$dir/usr/lib/systemd/system" "$dir/DEBIAN"
  for unit in "${@:4}"; do
    sed 's|/usr/local/bin/|/usr/bin/|' "$unit" >"$dir/usr/lib/systemd/system/$(basename "$unit")"
  done
  install -D -m 644 "$root/deploy/systemd/$2" "$dir/etc/mayfly/$2"
  echo "/etc/mayfly/$2" >"$dir/DEBIAN/conffiles"
  # Running units continue with the new program. A drain loses no request.
  cat >"$dir/DEBIAN/postinst" <<TEXT
#!/bin/sh
set -e
if [ "\$1" = configure ] && [ -z "\$DPKG_ROOT" ] && [ -d /run/systemd/system ]; then
  systemctl daemon-reload
  systemctl try-restart '$3' || true
fi
TEXT
  cat >"$dir/DEBIAN/prerm" <<TEXT
#!/bin/sh
set -e
if [ "\$1" = remove ] && [ -z "\$DPKG_ROOT" ] && [ -d /run/systemd/system ]; then
  systemctl stop '$3' || true
fi
TEXT
  # /var/lib/mayfly has the list of accounts and the only master key, so it stays, also at a purge.
  cat >"$dir/DEBIAN/postrm" <<TEXT
#!/bin/sh
set -e
if [ "\$1" = remove ] && [ -z "\$DPKG_ROOT" ] && [ -d /run/systemd/system ]; then
  systemctl daemon-reload
fi
TEXT
  chmod 755 "$dir/DEBIAN/postinst" "$dir/DEBIAN/prerm" "$dir/DEBIAN/postrm"
}

shopt -s extglob nullglob
# All other units are the dispatcher's.
service mayfly-dispatcher dispatcher.toml mayfly-dispatcher.service "$root"/deploy/systemd/!(mayfly-engine*|*.toml)
package mayfly-dispatcher 'short-lived PostgreSQL credentials: the dispatcher' \
  'Gives applications PostgreSQL accounts that live for minutes. This is the server with the HTTP API.
It needs RabbitMQ, whose URL is in /etc/mayfly/amqp-url (mode 0600).'
service mayfly-engine engine.toml 'mayfly-engine@*.service' "$root"/deploy/systemd/mayfly-engine*
package mayfly-engine 'short-lived PostgreSQL credentials: the engine' \
  'Gives applications PostgreSQL accounts that live for minutes. This is what runs next to the databases.
The key of a pool POOL is in /etc/mayfly/POOL.key; the unit is mayfly-engine@POOL.'
for shell in bash zsh fish; do
  case $shell in
    bash) file=bash-completion/completions/mayfly ;;
    zsh) file=zsh/vendor-completions/_mayfly ;;
    fish) file=fish/vendor_completions.d/mayfly.fish ;;
  esac
  mkdir -p "$(dirname "$work/mayfly/usr/share/$file")"
  "$programs/mayfly" completions $shell >"$work/mayfly/usr/share/$file"
done
install -d "$work/mayfly/usr/share/man/man1"
"$programs/mayfly" man "$work/mayfly/usr/share/man/man1"
gzip -9n "$work/mayfly/usr/share/man/man1"/*.1
package mayfly 'short-lived PostgreSQL credentials: the command line' \
  'Gives applications PostgreSQL accounts that live for minutes. This is the command line.'
