"""`make capacity`: throughput of one core and of one machine, and the effect of table size.

The cases take turns in each round, so that other load on the machine affects all of them.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from testbed import wait_until
from testbed.database import Postgres, execute
from testbed.load import scrape_time
from testbed.service import Service

from .bench import machine, measured, new_table
from .wrk import spread, wrk

ROUNDS = 5
SECONDS = 4
CLIENTS = 32  # saturates the machine; one client shows the effect of table size best
ROWS = (1_000, 100_000, 1_000_000)
FILL = """
INSERT INTO users (email, email_folded, first_name, last_name)
SELECT 'row' || n || '@example.com', 'row' || n || '@example.com', 'John', 'Doe'
FROM generate_series(1, {}) AS n
"""


@dataclass
class Case:
    """A database, and the measurements of each round on it: signups per second, and times."""

    name: str
    url: str
    clients: int = CLIENTS
    pin: Callable[[Service], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    rates: list[float] = field(default_factory=list)
    milliseconds: dict[str, list[float]] = field(default_factory=dict)

    def measure(self, postgres: Postgres) -> None:
        with Service(DATABASE_URL=self.url, WEB_CONCURRENCY="2") as service:
            wait_until(lambda: service.metrics().get_value("signup_workers") == 2)
            with self.pin(service):
                wrk(service.url, self.clients, 1)  # opens the connections of the pool
                before, pids = service.quiet_metrics(), (service.process.pid, postgres.pids()[0])
                run, signups, costs = measured(service.url, self.url, pids, self.clients, SECONDS)
                now = service.quiet_metrics()
                scrape = scrape_time(service, times=30)

        def increase(name: str) -> float:
            return now.total(name) - before.total(name)

        assert increase("signup_requests_total") == signups
        query = "database_query_duration_seconds"
        insert = increase(f"{query}_sum") / increase(f"{query}_count")
        self.rates.append(run.rate)
        names = ("p50", "p99", "INSERT", "scrape", "service CPU", "database CPU")
        for name, value in zip(names, (run.p50, run.p99, insert, scrape, *costs), strict=True):
            self.milliseconds.setdefault(f"{name}, ms", []).append(value * 1000)


@contextlib.contextmanager
def on_one_core(service: Service) -> Iterator[None]:
    """Pin the service to one core, and the load to the other cores."""
    cores = os.sched_getaffinity(0)
    first = min(cores)

    def pin(where: set[int]) -> None:
        for pid in (service.process.pid, *service.worker_pids()):
            for thread in Path(f"/proc/{pid}/task").iterdir():
                os.sched_setaffinity(int(thread.name), where)

    pin({first})
    os.sched_setaffinity(0, cores - {first})  # inherited by wrk
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)
        pin(cores)


def measure(postgres: Postgres) -> list[Case]:
    """Measure each case in turn, ROUNDS times; the last ones are tables of the sizes in ROWS."""
    cases = [
        Case("service on all cores", postgres.new_database()),
        Case("service on one core", postgres.new_database(), pin=on_one_core),
    ]
    for number in ROWS:
        url = new_table(postgres)
        execute(url, FILL.format(number))
        execute(url, "VACUUM ANALYZE users")
        cases.append(Case(f"{number:,} rows", url, clients=1))
    for _ in range(ROUNDS):
        execute(postgres.url, "CHECKPOINT")
        for case in cases:
            case.measure(postgres)
    return cases


def main() -> None:
    with Postgres() as postgres:
        cases = measure(postgres)
    print(f"{machine()}\nmedian of {ROUNDS} x {SECONDS} s (minimum to maximum)")
    for case in cases:
        print(f"{case.name}, {case.clients} client{'s' * (case.clients > 1)}")
        print("  signups/s        ", spread(case.rates, ".0f"))
        for name, values in case.milliseconds.items():
            print(f"  {name:17}", spread(values, ".2f"))


if __name__ == "__main__":
    main()
