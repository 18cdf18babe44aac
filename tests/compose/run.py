"""run.py COMPOSE: runs up.sh as it is shipped, twice, with ./docker, and uses what it has started. In a network, a
mount and a process namespace of its own (unshare): its ports are those of compose.yaml, and all of it ends with it."""

import fcntl
import json
import os
import socket
import struct
import subprocess
import sys
import time
import urllib.request

compose = sys.argv[1]
# Whatever the test has: what is made here is read by other users.
os.umask(0o022)
SIOCSIFFLAGS, IFF_UP = 0x8914, 1
with socket.socket() as any_socket:
    fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh", b"lo", IFF_UP))
hosts = f"{compose}/hosts"
with open(hosts, "w") as file:
    file.write("127.0.0.1 localhost rabbitmq postgres dispatcher prometheus\n127.0.0.2 engine-a\n127.0.0.3 engine-b\n")
subprocess.run(["mount", "--bind", hosts, "/etc/hosts"], check=True)
for part in ("roots", "volumes", "state"):
    os.mkdir(f"{compose}/{part}")

here = os.path.dirname(os.path.abspath(__file__))
environment = {**os.environ, "COMPOSE": compose, "PATH": f"{here}:{os.environ['PATH']}"}
for name in ("MAYFLY_ADDRESS", "MAYFLY_TOKEN"):
    environment.pop(name, None)
for turn in ("first", "second"):
    done = subprocess.run([f"{compose}/deploy/compose/up.sh"], env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, f"up.sh, the {turn} time: {done.stderr[-3000:]}"
    assert "Mayfly is running" in done.stdout, done.stdout

secrets = f"{compose}/deploy/compose/secrets"
environment |= {"MAYFLY_ADDRESS": "http://127.0.0.1:8470", "MAYFLY_TOKEN": open(f"{secrets}/root-token").read()}


def mayfly(*arguments):
    command = ["docker", "run", "--rm", "-i", "--network", "host", "-e", "MAYFLY_ADDRESS", "-e", "MAYFLY_TOKEN", "mayfly:0.1.0", *arguments]
    return subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)


def eventually(what, look):
    """Engines take some seconds to come; what is wrong stays wrong."""
    for _ in range(60):
        found, told = look()
        if found:
            return found
        time.sleep(1)
    sys.exit(f"{what}: {told}")


def engines():
    listed = mayfly("engine", "list", "-e", "json")
    return listed.returncode == 0 and len(json.loads(listed.stdout)["engines"]) == 2, listed.stdout + listed.stderr


def account():
    # What up.sh prints.
    read = mayfly("secret", "read", "db:shop:reader", "--ttl", "60", "-e", "json")
    return read.returncode == 0 and json.loads(read.stdout)["data"], read.stdout + read.stderr


def targets():
    try:
        with urllib.request.urlopen("http://127.0.0.1:9090/api/v1/targets", timeout=5) as answer:
            found = json.load(answer)["data"]["activeTargets"]
    except OSError as error:
        return False, error
    return len(found) == 3 and all(target["health"] == "up" for target in found), found


eventually("two engines", engines)
data = eventually("an account", account)
login = {**environment, "PGPASSWORD": data["password"], "PGCONNECT_TIMEOUT": "10"}
query = ["psql", "-XqAt", "-h", data["host"], "-p", str(data["port"]), "-U", data["username"], "-d", data["database"], "-c", "SELECT count(*) FROM invoices"]
seen = subprocess.run(query, env=login, capture_output=True, text=True)
assert seen.stdout.strip() == "3", seen.stderr
eventually("Prometheus sees all three", targets)
for board in os.listdir(f"{secrets}/dashboards"):
    assert json.load(open(f"{secrets}/dashboards/{board}"))["panels"], board
for part in ("dispatcher", "engine"):
    for file in os.listdir(f"{secrets}/{part}"):
        found = os.stat(f"{secrets}/{part}/{file}")
        assert (found.st_uid, found.st_mode & 0o777) == (65532, 0o400), f"{part}/{file}: {found}"
print("compose: ok")
