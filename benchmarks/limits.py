"""`make limits`: 1 to 200 clients, CPU by layer, scrapes, memory, and other worker counts.

It prints the figures of docs/performance.md.
"""

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace

import requests

from testbed import wait_until
from testbed.database import Postgres
from testbed.load import Repeated

from . import bench
from .bench import CONTENDERS, Contender, Run, new_table, running, settled_rows, spread, wrk

CLIENTS = (1, 2, 4, 8, 16, 32, 64, 128, 200)
ROUNDS = int(os.environ.get("ROUNDS", "5"))
SECONDS = int(os.environ.get("SECONDS", "3"))
SIGNUPS = int(os.environ.get("SIGNUPS", "200000"))
SERVICE = CONTENDERS[0]


def sweep(postgres: Postgres, contenders: dict[str, Contender], clients: Sequence[int]) -> None:
    """Measure and print throughput and p99 by contender and number of clients."""
    runs: dict[str, dict[int, list[Run]]] = {name: {} for name in contenders}
    for _ in range(ROUNDS):
        for name, contender in contenders.items():
            with running(contender, new_table(postgres)) as (address, _):
                wrk(address, 32, 2)
                for number in clients:
                    run = wrk(address, number, SECONDS)
                    assert name != bench.OURS or run.refused == run.unanswered == 0, run
                    runs[name].setdefault(number, []).append(run)
    for name, by_clients in runs.items():
        print(name)
        for number, measured in by_clients.items():
            rate = spread([run.rate for run in measured])
            p99 = spread([run.p99 * 1000 for run in measured])
            failed = sum(run.refused + run.unanswered for run in measured)
            print(f"  {number:3} clients  {rate:22} signups/s  p99 {p99:18} ms  failed {failed}")


def curve(postgres: Postgres) -> None:
    """Throughput and p99 by number of clients; this service must respond with 201 only."""
    peers = {peer.name: peer for peer in CONTENDERS if "without" not in peer.name}
    sweep(postgres, peers, CLIENTS)


def workers(postgres: Postgres) -> None:
    sweep(postgres, {f"{n} workers": with_workers(n) for n in (1, 2, 3, 4)}, (32, 200))


def with_workers(number: int) -> Contender:
    return replace(SERVICE, env=(("WEB_CONCURRENCY", str(number)),))


def layers(postgres: Postgres) -> None:
    """The CPU of a signup by layer, each the difference between two contenders."""
    alone = replace(SERVICE, command=(*SERVICE.command[:-1], "benchmarks.peers.nothing:app"))
    costs: dict[str, list[float]] = {}
    for _ in range(ROUNDS):
        used: list[float] = []
        for contender in (alone, CONTENDERS[1], SERVICE):
            with running(contender, new_table(postgres)) as (address, pid):
                wrk(address, 32, 2)
                pids = pid, postgres.pids()[0]
                before = [bench.cpu(pid) for pid in pids]
                run = wrk(address, 32, SECONDS)
                spent = [bench.cpu(pid) - start for pid, start in zip(pids, before, strict=True)]
                service, server = (seconds / run.created * 1000 for seconds in spent)
                used.append(service)
        for name, cost in (
            ("gunicorn, gevent", used[0]),
            ("Flask, validation, driver, log", used[1] - used[0]),
            ("metrics", used[2] - used[1]),
            ("PostgreSQL", server),
        ):
            costs.setdefault(name, []).append(cost)
    for name, measured in costs.items():
        print(f"{name:36} {spread(measured)} ms of CPU")


def scrapes(postgres: Postgres) -> None:
    """The CPU of a scrape with 4 workers, and the p99 with and without one scrape per second."""

    def scrape(address: str) -> None:
        requests.get(f"{address}/metrics", timeout=10).raise_for_status()

    def scrape_slowly() -> None:
        scrape(address)
        time.sleep(1)

    costs, with_scrapes, without = [], [], []
    for _ in range(ROUNDS):
        with running(with_workers(4), new_table(postgres)) as (address, pid):
            wait_until(lambda: len(bench.private_memory(pid)) == 4)
            wrk(address, 32, 2)
            before = bench.cpu(pid)
            for _ in range(200):
                scrape(address)
            costs.append((bench.cpu(pid) - before) / 200)
        with running(SERVICE, new_table(postgres)) as (address, _):
            wrk(address, 32, 2)
            without.append(wrk(address, 32, 5).p99)
            with Repeated(scrape_slowly):
                with_scrapes.append(wrk(address, 32, 5).p99)
    print(f"scrape with 4 workers: {spread([c * 1000 for c in costs])} ms of CPU")
    print(f"p99 without scrapes: {spread([p * 1000 for p in without])} ms")
    print(f"p99 with one scrape per second: {spread([p * 1000 for p in with_scrapes])} ms")


def memory(postgres: Postgres) -> None:
    """Private memory per worker over SIGNUPS signups."""
    url = new_table(postgres)
    with running(SERVICE, url) as (address, pid):
        rows = 0
        for part in range(5):
            while rows < max(2000, SIGNUPS * part / 4):
                wrk(address, 32, 2 if part == 0 else 10)
                rows = settled_rows(url)
            each = ", ".join(f"{size:.1f}" for size in bench.private_memory(pid))
            print(f"after {rows:7} signups: {each} MB per worker")


if __name__ == "__main__":
    parts = {part.__name__: part for part in (curve, layers, scrapes, memory, workers)}
    print(bench.machine())
    with Postgres(fsync=True) as server:
        for name in sys.argv[1:] or parts:
            parts[name](server)
