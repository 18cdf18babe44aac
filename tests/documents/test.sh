#!/usr/bin/env bash
# Runs what the documents say (check.py beside this file): test.sh TOOLS DRIVERS, where TOOLS is what helm/tools.sh
# prints, and DRIVERS what drivers.sh prints. It has a network and an /etc/hosts of its own, so that the documents' hosts and ports are there as
# they are written.
set -euo pipefail
cd "$(dirname "$0")/../.."
exec unshare --net --mount --propagation private bash -euc '
  python3 - <<PY
import fcntl, socket, struct
# Bring the loopback interface up: SIOCSIFFLAGS with IFF_UP, netdevice(7).
fcntl.ioctl(socket.socket(socket.AF_INET, socket.SOCK_DGRAM), 0x8914, struct.pack("16sH14x", b"lo", 1))
PY
  exec env MAYFLY_RABBITMQ_MANAGEMENT=1 deploy/local/with-servers.sh "$1/venv/bin/python" tests/documents/check.py "$1" "$2"
' bash "${1:?the tools}" "${2:?the drivers}"
