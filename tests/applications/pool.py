"""A pool of SQLAlchemy over psycopg2 as its documentation shows it: pool.py PORT DATABASE. Four workers, and five
connections. A line of input ends it. It prints the numbers of transactions and of accounts; an error ends it with 1."""

import os
import sys
import threading
import time
import traceback

from sqlalchemy import create_engine, text

port, database = sys.argv[1:]
engine = create_engine(f"postgresql+psycopg2://app@127.0.0.1:{port}/{database}", pool_size=5, pool_pre_ping=True)
accounts, done, stops = set(), [0] * 4, threading.Event()


def work(number):
    try:
        while not stops.is_set():
            with engine.begin() as connection:
                accounts.add(connection.execute(text("SELECT current_user")).scalar())
                assert connection.execute(text("SELECT count(*) FROM things WHERE n > :n"), {"n": 0}).scalar() == 1
                connection.execute(text("SELECT pg_sleep(0.03)"))
            done[number] += 1
            time.sleep(0.3)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


workers = [threading.Thread(target=work, args=[number]) for number in range(4)]
for worker in workers:
    worker.start()
sys.stdin.readline()
stops.set()
for worker in workers:
    worker.join()
print(sum(done), len(accounts))
