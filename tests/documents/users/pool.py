"""Uses a snippet in Python: pool.py SNIPPET. Prints the accounts that it has seen."""

import asyncio
import os
import runpy
import sys
import time

ACCOUNTS = int(os.environ["ACCOUNTS"])
made = runpy.run_path(sys.argv[1])
seen, end = set(), time.monotonic() + int(os.environ["SECONDS"])


def goes_on():
    return len(seen) < ACCOUNTS and time.monotonic() < end


async def by_pool():
    pool, _task = await made["open_pool"]()
    while goes_on():
        seen.add(await pool.fetchval("SELECT current_user"))
        await asyncio.sleep(0.1)


def by_django():
    import django
    from django.conf import settings
    from django.db import close_old_connections, connection
    settings.configure(DATABASES=made["DATABASES"])
    django.setup()
    while goes_on():
        # Django does this before each request.
        close_old_connections()
        with connection.cursor() as cursor:
            cursor.execute("SELECT current_user")
            seen.add(cursor.fetchone()[0])
        time.sleep(0.1)


if "open_pool" in made:
    asyncio.run(by_pool())
elif "DATABASES" in made:
    by_django()
else:
    while goes_on():
        seen.add(made["query"]("SELECT current_user")[0])
        time.sleep(0.1)
print(*sorted(seen), flush=True)
# Pools of threads need not end.
os._exit(0 if len(seen) >= ACCOUNTS else 1)
