#!/usr/bin/env python3
"""Runs what the documents say, on real servers: check.py TOOLS DRIVERS, by test.sh beside this file.
DOCUMENT=word: only the documents whose name contains it."""

import asyncio
import json
import os
import re
import shlex
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
from glob import glob

import yaml

sys.dont_write_bytecode = True
sys.path[:0] = [os.path.dirname(os.path.abspath(__file__)), "helm"]

import names
import snippets
from blocks import blocks_of, documents
from checks import tools

ROOT = os.getcwd()
TOOLS = sys.argv[1]
os.environ.update(DRIVERS=sys.argv[2], ROOT=ROOT)
BINARIES = f"{ROOT}/target/debug"
RUN = f"{os.environ['MAYFLY_TEST_DIR']}/documents"
BROKER, DATABASE = os.environ["MAYFLY_TEST_BROKER"], os.environ["MAYFLY_TEST_PG15"]
# A path that other programs find at the same place, in a directory of this run.
SHIMS = f"{RUN}/shims"


def read(path):
    return open(path).read().strip()


def shell(text, directory, stdin=subprocess.DEVNULL, **environment):
    """Runs a script as a person would at a terminal, and fails with what it says."""
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", text], cwd=directory, text=True, stdin=stdin,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, **environment}, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


# The hosts of the documents

HOSTS = {
    "rabbitmq": "127.0.0.2", "mayfly-rabbitmq": "127.0.0.2", "rabbitmq.example.com": "127.0.0.3",
    "db.example.com": "127.0.0.4", "mayfly-dispatcher": "127.0.0.1", "mayfly-dispatcher.mayfly.svc": "127.0.0.1",
}


def serve_hosts():
    """The hosts and ports that the documents name lead to the servers of this run."""
    amqp = int(re.search(r":(\d+)/", read(f"{BROKER}/amqp-url"))[1])
    management = int(re.search(r"127.0.0.1:(\d+)/", read(f"{BROKER}/management-url"))[1])
    with open(f"{RUN}/hosts", "w") as file:
        file.write("127.0.0.1 localhost\n::1 localhost\n" + "".join(f"{address} {name}\n" for name, address in HOSTS.items()))
    subprocess.run(["mount", "--bind", f"{RUN}/hosts", "/etc/hosts"], check=True)
    shell("openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 30 -subj /CN=authority -keyout ca.key -out ca.pem;"
          "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 30 -subj /CN=servers"
          " -addext subjectAltName=DNS:rabbitmq.example.com,DNS:db.example.com -addext basicConstraints=critical,CA:FALSE"
          " -CA ca.pem -CAkey ca.key -keyout server.key -out server.pem", RUN)
    for made in ("key", "pem"):
        there = f"{DATABASE}/data/server.{made.replace('pem', 'crt')}"
        with open(there, "w") as file:
            file.write(open(f"{RUN}/server.{made}").read())
    sql("SELECT pg_reload_conf()")
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(f"{RUN}/server.pem", f"{RUN}/server.key")

    async def pipe(reader, writer):
        try:
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()

    def to(port):
        async def connected(reader, writer):
            there = await asyncio.open_connection("127.0.0.1", port)
            await asyncio.gather(pipe(reader, there[1]), pipe(there[0], writer))
        return connected

    async def forward(ready):
        for address, port, real, context in [
            ("127.0.0.2", 5672, amqp, None), ("127.0.0.3", 5672, amqp, None), ("127.0.0.3", 5671, amqp, tls),
            ("127.0.0.3", 15671, management, tls), ("127.0.0.4", 5432, int(read(f"{DATABASE}/port")), None),
        ]:
            await asyncio.start_server(to(real), address, port, ssl=context)
        ready.set()
        await asyncio.Event().wait()

    ready = threading.Event()
    threading.Thread(target=lambda: asyncio.run(forward(ready)), daemon=True).start()
    assert ready.wait(10)


# The programs of the documents

def make_shims():
    """What stands in front of programs: what would go on in a terminal of its own goes on in the background,
    and there is no cluster and no container engine."""
    os.makedirs(SHIMS)

    def shim(name, text):
        with open(f"{SHIMS}/{name}", "w") as file:
            file.write(f"#!/bin/bash\nset -euo pipefail\n{text}\n")
        os.chmod(f"{SHIMS}/{name}", 0o755)

    for name in ("kubectl", "helm", "skopeo"):
        shim(name, f'exec {shlex.quote(sys.executable)} "$ROOT/tests/documents/cluster.py" "$0" "$@"')
    # The program runs in the background, and its shim ends when the program is ready.
    for name, port in (("mayfly-dispatcher", 8471), ("mayfly-engine", 8472)):
        shim(name, f"""
            setsid "$BINARIES/{name}" "$@" >>"$PLACE/{name}.log" 2>&1 </dev/null & pid=$!
            mkdir -p "$PLACE/running" && echo $pid >"$PLACE/running/{name}"
            for _ in $(seq 600); do
              kill -0 $pid 2>/dev/null || {{ tail -n 5 "$PLACE/{name}.log"; exit 1; }}
              if (exec 3<>/dev/tcp/127.0.0.1/{port} && printf 'GET /readyz HTTP/1.0\\r\\n\\r\\n' >&3 && head -n 1 <&3) 2>/dev/null | grep -q ' 200 '; then exit; fi
              sleep 0.1
            done
            echo "it is not ready:"; tail -n 5 "$PLACE/{name}.log"; exit 1""")
    # A question to a person is answered with yes. An agent, and a proxy without a command, go on in the background.
    shim("mayfly", """
        case "${1:-} $*" in
          agent*) ready="curl --silent --fail http://127.0.0.1:8475/readyz" ;;
          proxy*" -- "*) ready= ;;
          proxy*) ready="pg_isready --quiet -h 127.0.0.1 -p 6432" ;;
          *) ready= ;;
        esac
        if [ -n "$ready" ]; then
          setsid "$BINARIES/mayfly" "$@" >>"$PLACE/$1.log" 2>&1 </dev/null & pid=$!
          mkdir -p "$PLACE/running" && echo $pid >"$PLACE/running/$1"
          for _ in $(seq 600); do
            kill -0 $pid 2>/dev/null || { tail -n 5 "$PLACE/$1.log"; exit 1; }
            if $ready >/dev/null; then exit; fi
            sleep 0.1
          done
          echo "it is not ready:"; tail -n 5 "$PLACE/$1.log"; exit 1
        fi
        if [ "${1:-}" != uninstall ]; then exec "$BINARIES/mayfly" "$@"; fi
        script -qec "$BINARIES/mayfly $*" /dev/null <<<y""")
    shim("rabbitmqctl", """
        command=$1
        shift
        case $command in
          import_definitions) cat "${1:-/dev/stdin}" >"$RUN/definitions" && set -- "$RUN/definitions" ;;
          add_user) [ $# -gt 1 ] || set -- "$1" "a password" ;;
        esac
        exec "$ROOT/deploy/local/rabbitmq.sh" ctl "$BROKER" -q "$command" "$@" """)
    shim("docker", """
        [ "$1" = build ] && [ "$2" = -f ] && [ "$4" = --target ] && [ "$6" = -t ] && [ "${8:-}" = . ] || { echo "docker $*: not known here"; exit 1; }
        grep -q " AS $5$" "$ROOT/$3" || { echo "$3 has no target $5"; exit 1; }
        grep -qx "appVersion: ${7#*:}" "$ROOT/helm/mayfly/Chart.yaml" || { echo "$7 is no version of now"; exit 1; }""")
    shim("make", 'exec /usr/bin/make -n -C "$ROOT" "$@" >/dev/null')
    # To another machine: a directory here.
    shim("scp", """
        for to; do :; done
        mkdir -p "$PLACE/../${to%%:*}/${to#*:}"
        cp "${@:1:$#-1}" "$PLACE/../${to%%:*}/${to#*:}" """)
    # Nobody is at a terminal.
    shim("psql", 'exec /usr/bin/psql -X "$@" </dev/null')
    os.environ.update(PATH=f"{SHIMS}:{BINARIES}:{os.environ['PATH']}", BINARIES=BINARIES, RUN=RUN, TOOLS=TOOLS,
                      BROKER=BROKER, SSL_CERT_FILE=f"{RUN}/ca.pem")


def place(name):
    """The directory in which a document's commands are run, with what a checkout has."""
    directory = f"{RUN}/{name}"
    if not os.path.isdir(directory) or not os.path.exists(f"{directory}/helm"):
        os.makedirs(f"{directory}/home", exist_ok=True)
        shutil.copytree(f"{ROOT}/deploy", f"{directory}/deploy")
        os.symlink(f"{ROOT}/helm", f"{directory}/helm")
    return directory


def in_place(name, text):
    directory = place(name)
    return shell(text, directory, PLACE=directory, CLUSTER=f"{directory}/cluster", HOME=f"{directory}/home")


def end(name):
    """Ends what a place's commands left running."""
    pids = [int(read(file)) for file in glob(f"{RUN}/{name}/running/*")]
    pids += [json.load(open(file))["pid"] for file in glob(f"{RUN}/{name}/cluster/pods/*.json")]
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def sql(text, database="postgres"):
    done = subprocess.run(["/usr/bin/psql", "-XqAt", "-v", "ON_ERROR_STOP=1", "-h", "127.0.0.1", "-p", read(f"{DATABASE}/port"), "-U", "postgres", "-d", database],
                          input=text, text=True, capture_output=True, env={**os.environ, "PGPASSWORD": read(f"{DATABASE}/superuser-password")})
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def pgbouncer(text, directory):
    """PgBouncer starts with these settings, and says nothing against them."""
    # PgBouncer refuses to run as root.
    os.makedirs(f"{directory}/pooler", exist_ok=True)
    shutil.chown(f"{directory}/pooler", "postgres", "postgres")
    for parent in (directory, RUN):
        os.chmod(parent, 0o711)
    file = f"{directory}/pooler/pgbouncer.ini"
    with open(file, "w") as settings:
        settings.write(f"[databases]\n* = host=127.0.0.1\n[pgbouncer]\nlisten_addr = 127.0.0.5\nlisten_port = 6432\nunix_socket_dir =\n{text}")
    log = f"{directory}/pooler/log"
    with open(log, "w") as output:
        process = subprocess.Popen(["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups", "/usr/sbin/pgbouncer", file],
                                   stdout=output, stderr=subprocess.STDOUT)
    try:
        until(lambda: process.poll() is not None or "process up" in read(log), "PgBouncer starts")
    finally:
        process.kill()
        process.wait()
    said = [line for line in read(log).split("\n") if re.search(" (ERROR|WARNING|FATAL) ", line)]
    assert "process up" in read(log) and not said, read(log)


def unit(text, directory):
    """systemd takes the unit, with the program of this run."""
    file = f"{directory}/documented.service"
    with open(file, "w") as written:
        written.write(text.replace("/usr/bin/mayfly", f"{BINARIES}/mayfly"))
    done = subprocess.run(["systemd-analyze", "verify", file], text=True, capture_output=True)
    said = done.stdout + done.stderr
    assert done.returncode == 0 and "documented.service" not in said, said


def sidecars(text):
    """The program takes the arguments of the pod's sidecars."""
    for container in yaml.safe_load(text)["spec"]["initContainers"]:
        done = subprocess.run([f"{BINARIES}/mayfly", *container["args"], "--help"], text=True, capture_output=True)
        assert done.returncode == 0, done.stderr


def until(check, what):
    for _ in range(600):
        if check():
            return
        time.sleep(0.1)
    raise AssertionError(f"not within 60 s: {what}")


# What is there before, and what must be true after

def prepare_databases():
    sql("CREATE DATABASE app")
    sql("CREATE ROLE app_owner; CREATE ROLE pgbouncer LOGIN; CREATE SCHEMA pgbouncer", "app")


def prepare_admin():
    """The admin of db.example.com."""
    sql("CREATE ROLE admin LOGIN CREATEROLE PASSWORD 'P@ssword!'; GRANT CREATE ON DATABASE postgres TO admin;"
        "CREATE SCHEMA shop AUTHORIZATION admin; CREATE TABLE shop.orders (); ALTER TABLE shop.orders OWNER TO admin")


def prepare_readme():
    in_place("readme", "rabbitmqctl add_user user password; rabbitmqctl set_permissions user '.*' '.*' '.*'")


def prepare_applications():
    """A directory in memory, of this run alone, at the place that the document names."""
    os.makedirs("/run/app", exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m,mode=0700", "tmpfs", "/run/app"], check=True)


def snippets_follow_the_account():
    snippets.wait_for_all()
    for program in ("agent", "proxy"):
        pid = int(read(f"{RUN}/readme/running/{program}"))
        os.kill(pid, signal.SIGTERM)
        until(lambda: not os.path.exists(f"/proc/{pid}") or " Z " in read(f"/proc/{pid}/stat"), f"the {program} ends")
    until(lambda: "active" not in in_place("readme", "mayfly lease list --path db:app"), "its leases are revoked")
    in_place("readme", "mayfly secret delete db:app --leases revoke")


def prepare_broker():
    in_place("broker", "rabbitmqctl add_vhost mayfly; rabbitmqctl add_user admin password; rabbitmqctl set_user_tags admin administrator;"
                       "rabbitmqctl set_permissions -p mayfly admin '.*' '.*' '.*'")


def prepare_chart():
    shutil.copy(f"{ROOT}/helm/mayfly/ci/single-values.yaml", f"{place('chart')}/my-values.yaml")
    in_place("chart", "mkdir -p cluster; helm package helm/mayfly; helm push mayfly-*.tgz oci://registry.example.com/charts")


def prepare_compose():
    # up.sh needs a container engine, so a script that does nothing replaces it.
    with open(f"{place('compose')}/deploy/compose/up.sh", "w") as file:
        file.write("#!/bin/sh\n")


def a_secret_is_read():
    """What the document leaves to the README: a server and a secret; and helm test tries it."""
    in_place("cluster", """
        kubectl -n mayfly rollout status deployment mayfly-engine-orders
        mayfly secret create --body '{"path": "db:root", "attributes": {"type": "postgresql"},
          "data": {"host": "db.example.com", "port": 5432, "username": "admin", "password": "P@ssword!", "sslmode": "verify-full"}}'
        mayfly secret create --body '{"path": "db:reader", "attributes": {"grantPermissions": {"what": "SELECT", "where": "shop.*"},
          "linkConfig": {"linkType": "dynamic", "linkedSecret": "db:root"}, "pool": "orders", "ttl": 600}, "data": {}}'
        mayfly secret check db:reader
        helm -n mayfly upgrade mayfly helm/mayfly --reset-then-reuse-values --set tests.secretPath=db:reader
        helm -n mayfly test mayfly""")
    notes = read(f"{RUN}/cluster/cluster/notes")
    commands = "\n".join(line for line in notes.split("\n") if line.startswith("  "))
    assert "mayfly login" in commands, notes
    in_place("cluster", commands)
    # The document removes Mayfly later. An account and its grant role then exist.
    in_place("cluster", "mayfly secret read db:reader")
    assert made_roles() - OTHERS, "the secret has no grant role"


def made_roles():
    """What Mayfly keeps on a server beside accounts."""
    return set(sql("SELECT rolname FROM pg_roles WHERE rolname LIKE 'mayfly\\_grant%' OR rolname LIKE 'mayfly\\_quarantine%'").split())


# Roles of the README's installation, which continues.
OTHERS = set()


def prepare_cluster():
    """A database for the store, whose role has the name of the admin in docs/databases.md."""
    if sql("SELECT count(*) FROM pg_roles WHERE rolname = 'mayfly'") != "0":
        sql("ALTER ROLE mayfly RENAME TO admin_of_app")
    OTHERS.update(made_roles())
    sql("CREATE ROLE mayfly LOGIN PASSWORD 'password'")
    sql("CREATE DATABASE mayfly OWNER mayfly")


def store_is_moved():
    """What was made before the restore and the move is there after them, and goes on."""
    in_place("cluster", "mayfly secret read db:reader")
    assert int(sql("SELECT count(*) FROM public.leases", "mayfly")) > 0, "the store is not in PostgreSQL"


def site_is_connected():
    until(lambda: "site7" in in_place("cluster", "mayfly engine list -e json"), "the site's engine is seen")


def nothing_is_left():
    left = made_roles() - OTHERS
    assert not left, f"left on the server: {left}"


# The section of the last snippet.
SNIPPETS_END = "Rails — tested with Active Record 6.1 of Debian, through the proxy"

# In this order. By document: the place of its commands, what is there before, and by section what must be true after it.
DOCUMENTS = {
    "docs/databases.md": ("databases", prepare_databases, {}),
    "README.md": ("readme", prepare_readme, {}),
    "docs/proxy.md": ("readme", None, {}),
    "docs/applications.md": ("readme", prepare_applications, {SNIPPETS_END: snippets_follow_the_account}),
    "docs/runbook.md": ("readme", None, {}),
    "CONTRIBUTING.md": ("readme", None, {}),
    "deploy/rabbitmq/README.md": ("broker", prepare_broker, {}),
    "deploy/compose/README.md": ("compose", prepare_compose, {}),
    "docs/kubernetes.md": ("cluster", prepare_cluster, {
        "Install": a_secret_is_read, "Connect a remote site": site_is_connected, "The store": store_is_moved, "Remove it": nothing_is_left,
    }),
    "helm/mayfly/README.md": ("chart", prepare_chart, {}),
}


def run_block(block, where):
    where = block.options.get("at", where)
    if block.language == "sql":
        sql(block.text, "app")
    elif block.language == "ini":
        pgbouncer(block.text, place(where))
    elif block.language == "sh":
        in_place(where, block.text)
    elif block.language == "systemd":
        unit(block.text, place(where))
    elif block.language == "yaml" and block.act == "check":
        sidecars(block.text)
    elif block.act == "run":
        snippets.start(block, place(where))


def run_blocks(file, wanted):
    blocks = blocks_of(file)
    if not blocks or not wanted:
        return len(blocks)
    assert file in DOCUMENTS, f"{file} has blocks: tests/documents/check.py must say where they are run"
    where, prepare, afterwards = DOCUMENTS[file]
    if prepare:
        prepare()
    for at, block in enumerate(blocks):
        begun = time.monotonic()
        try:
            run_block(block, where)
            last = all(one.section != block.section for one in blocks[at + 1:])
            if last and block.section in afterwards:
                afterwards[block.section]()
        except (AssertionError, subprocess.SubprocessError) as failed:
            raise AssertionError(f"{block.place}: {failed}\n--- the block:\n{block.text}") from None
        print(f"documents: {block.place}: ok ({time.monotonic() - begun:.1f} s)", flush=True)
    if file == "docs/runbook.md":
        # The next documents use its ports.
        end("readme")
    return len(blocks)


def main():
    word = os.environ.get("DOCUMENT", "")
    os.makedirs(RUN)
    # A wrong mark is reported at once.
    files = [file for file in documents() if word in file]
    assert files, f"no document is called {word}"
    count = sum(len(blocks_of(file)) for file in documents())
    print(f"documents: names: ok ({names.check(files, ROOT)})", flush=True)
    make_shims()
    serve_hosts()
    # What Helm asks a cluster for before it tells what comes next.
    tools.with_cluster()
    prepare_admin()
    try:
        # Documents that are not known must have no blocks. What a chosen document needs is run before it.
        order = [*DOCUMENTS, *(one for one in documents() if one not in DOCUMENTS)]
        places = {file: DOCUMENTS.get(file, (file,))[0] for file in order}
        for at, file in enumerate(order):
            run_blocks(file, any(word in other and places[other] == places[file] for other in order[at:]))
    finally:
        for name in {where for where, _, _ in DOCUMENTS.values()} | {"site7"}:
            end(name)
    print(f"documents: {count} blocks of {len(documents())} documents", flush=True)


try:
    main()
except AssertionError as failed:
    sys.exit(f"documents: {failed}")
