"""The snippets of docs/applications.md: each runs unchanged until it has used several accounts, without an error.
The programs that use them are in users/."""

import os
import re
import subprocess
import time

# Each snippet goes on until it has seen this number of accounts.
ACCOUNTS = 3
SECONDS = 150
USERS = f"{os.path.dirname(os.path.abspath(__file__))}/users"
JARS = ":".join(f"/usr/share/java/{name}.jar" for name in ("HikariCP", "postgresql", "slf4j-api", "slf4j-nop"))

# By language: the name of the snippet's file, and the command. They stand in a directory of their own.
LANGUAGES = {
    "python": ("snippet.py", '"$DRIVERS/venv/bin/python" "$USERS/pool.py" snippet.py'),
    "js": ("snippet.js", 'NODE_PATH="$DRIVERS/node_modules" node "$USERS/pool.js" "$PWD/snippet.js"'),
    "java": ("Database.java", 'javac -d . -cp "$JARS" "$USERS/Main.java" Database.java && exec java -cp "$JARS:." Main'),
    # The packages of Debian are no modules.
    "go": ("snippet.go", 'cp "$USERS/main.go" . && GO111MODULE=off GOPATH=/usr/share/gocode GOCACHE="$ROOT/target/documents/go"'
                         ' go build -o main main.go snippet.go && exec ./main'),
    "rust": ("snippet.rs", 'SNIPPET="$PWD/snippet.rs" exec cargo run --quiet --offline --locked'
                           ' --manifest-path "$USERS/sqlx/Cargo.toml" --target-dir "$ROOT/target/documents"'),
    "yaml": ("database.yml", 'ruby "$USERS/active_record.rb" database.yml'),
}
RUNNING = []


def start(block, directory):
    """Starts a snippet. `wait_for_all` waits for its end."""
    name = re.sub("[^a-z0-9]+", "-", block.section.lower()).strip("-")
    file, command = LANGUAGES[block.language]
    place = f"{directory}/{name}"
    os.makedirs(place)
    with open(f"{place}/{file}", "w") as snippet:
        snippet.write(block.text)
    environment = {**os.environ, "USERS": USERS, "JARS": JARS, "ACCOUNTS": str(ACCOUNTS), "SECONDS": str(SECONDS),
                   "PGSERVICEFILE": "/run/app/pg_service.conf"}
    process = subprocess.Popen(["bash", "-c", command], cwd=place, env=environment, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    RUNNING.append((block, process, time.monotonic()))


def wait_for_all():
    """All have used several accounts."""
    while RUNNING:
        block, process, begun = RUNNING.pop()
        said, _ = process.communicate(timeout=2 * SECONDS)
        assert process.returncode == 0, f"{block.place}, {block.section}: {said[-3000:]}"
        accounts = said.strip().split("\n")[-1].split()
        assert len(set(accounts)) >= ACCOUNTS, f"{block.place}, {block.section}: {said[-3000:]}"
        print(f"documents: {block.place}: {block.section}: {len(accounts)} accounts ({time.monotonic() - begun:.1f} s)", flush=True)
