"""The snippets of docs/applications.md: each runs unchanged until it has used several accounts, without an error."""

import os
import re
import subprocess
import time

# Each snippet goes on until it has seen this number of accounts.
ACCOUNTS = 3
SECONDS = 150

# What uses the snippet: the pool or the function that it makes.
USERS = {
    "python": """
import asyncio, runpy, sys, time
made = runpy.run_path(sys.argv[1])
seen, end = set(), time.monotonic() + SECONDS

async def by_pool():
    pool, _task = await made["open_pool"]()
    while len(seen) < ACCOUNTS and time.monotonic() < end:
        seen.add(await pool.fetchval("SELECT current_user"))
        await asyncio.sleep(0.1)

if "open_pool" in made:
    asyncio.run(by_pool())
else:
    while len(seen) < ACCOUNTS and time.monotonic() < end:
        seen.add(made["query"]("SELECT current_user")[0])
        time.sleep(0.1)
print(*sorted(seen))
# Pools of threads need not end.
sys.stdout.flush()
__import__("os")._exit(0 if len(seen) >= ACCOUNTS else 1)
""",
    "js": """
const { pool } = require(process.argv[2]);
const seen = new Set(), end = Date.now() + SECONDS * 1000;
(async () => {
  while (seen.size < ACCOUNTS && Date.now() < end) {
    const { rows } = await pool.query("SELECT current_user");
    seen.add(rows[0].current_user);
    await new Promise((resolve) => setTimeout(resolve, 100));
  }
  console.log([...seen].join(" "));
  process.exit(seen.size >= ACCOUNTS ? 0 : 1);
})().catch((error) => { console.error(error); process.exit(1); });
""",
}
RUNNING = []


def start(block, directory):
    """Starts a snippet. `wait_for_all` waits for its end."""
    name = re.sub("[^a-z0-9]+", "-", block.section.lower()).strip("-")
    suffix = {"python": "py", "js": "js"}[block.language]
    file, user = (f"{directory}/{one}.{suffix}" for one in (name, f"{name}-user"))
    with open(file, "w") as snippet:
        snippet.write(block.text)
    with open(user, "w") as program:
        program.write(USERS[block.language].replace("SECONDS", str(SECONDS)).replace("ACCOUNTS", str(ACCOUNTS)))
    drivers = os.environ["DRIVERS"]
    interpreter = f"{drivers}/venv/bin/python" if block.language == "python" else "node"
    environment = {**os.environ, "NODE_PATH": f"{drivers}/node_modules", "PGSERVICEFILE": "/run/app/pg_service.conf"}
    process = subprocess.Popen([interpreter, user, file], cwd=directory, env=environment, text=True,
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
