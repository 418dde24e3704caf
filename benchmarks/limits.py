"""`make limits`: 1 to 200 clients, CPU by layer, scrapes, memory, and other worker counts.

It draws docs/performance*.png, and prints the figures of the tables in docs/performance.md.
"""

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from statistics import median

import matplotlib.pyplot as plt
import requests

from testbed import ROOT, wait_until
from testbed.database import Postgres
from testbed.load import Repeated

from . import bench
from .bench import CONTENDERS, Contender, new_table, running, settled_rows
from .wrk import Run, spread, wrk

CLIENTS = (1, 2, 4, 8, 16, 32, 64, 128, 200)
ROUNDS = int(os.environ.get("ROUNDS", "5"))
SECONDS = int(os.environ.get("SECONDS", "3"))
SIGNUPS = int(os.environ.get("SIGNUPS", "200000"))
PEERS = tuple(contender for contender in CONTENDERS if "without" not in contender.name)
SERVICE = CONTENDERS[0]


def sweep(
    postgres: Postgres, contenders: dict[str, Contender], clients: Sequence[int]
) -> dict[str, dict[int, list[Run]]]:
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
            rate = spread([run.rate for run in measured], ".0f")
            p99 = spread([run.p99 * 1000 for run in measured], ".0f")
            failed = sum(run.refused + run.unanswered for run in measured)
            print(f"  {number:3} clients  {rate:22} signups/s  p99 {p99:18} ms  failed {failed}")
    return runs


def curve(postgres: Postgres) -> None:
    """Throughput and p99 by number of clients; this service must respond with 201 only."""
    runs = sweep(postgres, {peer.name: peer for peer in PEERS}, CLIENTS)
    figure, (rates, latencies) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for by_clients in runs.values():
        rates.plot(CLIENTS, [median(r.rate for r in by_clients[n]) for n in CLIENTS], "o-")
        p99s = [median(r.p99 * 1000 for r in by_clients[n]) for n in CLIENTS]
        latencies.plot(CLIENTS, p99s, "o-")
    for axes, title in ((rates, "signups per second"), (latencies, "p99 in milliseconds")):
        axes.set(title=title, xlabel="clients", xscale="log", xticks=CLIENTS, ylim=0)
        axes.set_xticklabels(map(str, CLIENTS))
        axes.grid(alpha=0.3)
    rates.legend(runs)
    figure.savefig(ROOT / "docs/performance.png", dpi=100)


def layers(postgres: Postgres) -> None:
    """The CPU of a signup by layer, each the difference between two contenders."""
    without = CONTENDERS[1]
    alone = replace(SERVICE, command=(*SERVICE.command[:-1], "benchmarks.peers.nothing:app"))
    costs: dict[str, list[float]] = {}
    for _ in range(ROUNDS):
        used: list[float] = []
        for contender in (alone, without, SERVICE):
            with running(contender, new_table(postgres)) as (address, pid):
                wrk(address, 32, 2)
                before = bench.cpu(pid), bench.cpu(postgres.pids()[0])
                run = wrk(address, 32, SECONDS)
                used.append((bench.cpu(pid) - before[0]) / run.created * 1000)
                server = (bench.cpu(postgres.pids()[0]) - before[1]) / run.created * 1000
        for name, cost in (
            ("gunicorn, gevent", used[0]),
            ("Flask, validation, driver, log", used[1] - used[0]),
            ("metrics", used[2] - used[1]),
            ("PostgreSQL", server),
        ):
            costs.setdefault(name, []).append(cost)
    figure, axes = plt.subplots(figsize=(11, 2.2), layout="constrained")
    left = 0.0
    for name, measured in costs.items():
        print(f"{name:36} {spread(measured, '.2f')} ms of CPU")
        axes.barh("signup", median(measured), left=left, label=name)
        left += max(0.0, median(measured))
    axes.set(xlabel="milliseconds of CPU")
    figure.legend(ncols=4, loc="outside upper center")
    figure.savefig(ROOT / "docs/performance-layers.png", dpi=100)


def scrapes(postgres: Postgres) -> None:
    """The CPU of a scrape with 4 workers, and the p99 with and without one scrape per second."""

    def scrape(address: str) -> None:
        requests.get(f"{address}/metrics", timeout=10).raise_for_status()

    def scrape_slowly() -> None:
        scrape(address)
        time.sleep(1)

    costs, with_scrapes, without = [], [], []
    four = replace(SERVICE, env=(("WEB_CONCURRENCY", "4"),))
    for _ in range(ROUNDS):
        with running(four, new_table(postgres)) as (address, pid):
            wait_until(lambda: len(bench.children(pid)) == 4)
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
    print(f"scrape with 4 workers: {spread([c * 1000 for c in costs], '.1f')} ms of CPU")
    print(f"p99 without scrapes: {spread([p * 1000 for p in without], '.1f')} ms")
    print(f"p99 with one scrape per second: {spread([p * 1000 for p in with_scrapes], '.1f')} ms")


def memory(postgres: Postgres) -> None:
    """Private memory per worker over SIGNUPS signups."""
    url = new_table(postgres)
    with running(SERVICE, url) as (address, pid):
        rows = 0
        for part in range(5):
            while rows < max(2000, SIGNUPS * part / 4):
                wrk(address, 32, 2 if part == 0 else 10)
                rows = settled_rows(url)
            each = sorted(
                bench.private_memory(worker) / bench.MEGABYTE for worker in bench.children(pid)
            )
            print(f"after {rows:7} signups: {', '.join(f'{m:.1f}' for m in each)} MB per worker")


def defaults(postgres: Postgres) -> None:
    """Throughput and p99 with 1 to 4 workers."""
    cases = {
        f"{n} workers": replace(SERVICE, env=(("WEB_CONCURRENCY", str(n)),)) for n in (1, 2, 3, 4)
    }
    sweep(postgres, cases, (32, 200))


if __name__ == "__main__":
    parts = {part.__name__: part for part in (curve, layers, scrapes, memory, defaults)}
    print(bench.machine())
    with Postgres() as server:
        for name in sys.argv[1:] or parts:
            parts[name](server)
