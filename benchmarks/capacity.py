"""`make capacity`: throughput of one core and of one machine, and the effect of table size.

The cases take turns in each round, so that other load on the machine affects all of them.
"""

import os
from typing import NamedTuple

from testbed.database import Postgres, execute
from testbed.load import scrape_time
from testbed.service import Client

from .bench import CLIENTS, CONTENDERS, machine, measured, new_table, report, running, wrk

ROUNDS = int(os.environ.get("ROUNDS", "5"))
SECONDS = int(os.environ.get("SECONDS", "4"))
CORES = os.sched_getaffinity(0)
ROWS = (1_000, 100_000, 1_000_000)
FILL = """
INSERT INTO users (email, email_folded, first_name, last_name)
SELECT 'row' || n || '@example.com', 'row' || n || '@example.com', 'John', 'Doe'
FROM generate_series(1, {}) AS n
"""


class Case(NamedTuple):
    name: str
    url: str  # of its database
    clients: int = CLIENTS  # saturates the machine; one client shows the effect of table size best
    cores: set[int] = CORES  # of the service; the load has the others, if there are any


def measure(case: Case, postgres: Postgres) -> dict[str, float]:
    """Return the signups per second, and times in milliseconds."""
    service, query = Client(), "database_query_duration_seconds"
    os.sched_setaffinity(0, case.cores)  # the service inherits it
    with running(CONTENDERS[0], case.url) as (service.url, pid):
        os.sched_setaffinity(0, CORES - case.cores or CORES)  # and wrk this
        service.wait_for(signup_workers=2)
        wrk(service.url, case.clients, 1)  # opens the connections of the pool
        before = service.quiet_metrics()
        pids = pid, postgres.pids()[0]
        run, _, costs = measured(service.url, case.url, pids, case.clients, SECONDS)
        now = service.quiet_metrics()
        scrape = scrape_time(service, times=30)
    total, count = (now.total(query + x) - before.total(query + x) for x in ("_sum", "_count"))
    names = ("p50", "p99", "INSERT", "scrape", "service CPU", "database CPU")
    seconds = (run.p50, run.p99, total / count, scrape, *costs)
    times = {f"{n}, ms": value * 1000 for n, value in zip(names, seconds, strict=True)}
    return {"signups/s": run.rate} | times


def main() -> None:
    with Postgres(fsync=True) as postgres:
        cases = [
            Case(f"service on all cores, {CLIENTS} clients", new_table(postgres)),
            Case(f"on one core, {CLIENTS} clients", new_table(postgres), cores={min(CORES)}),
        ]
        for number in ROWS:
            cases.append(Case(f"{number:,} rows, 1 client", new_table(postgres), clients=1))
            execute(cases[-1].url, FILL.format(number))
            execute(cases[-1].url, "VACUUM ANALYZE users")
        rounds: dict[str, list[dict[str, float]]] = {case.name: [] for case in cases}
        for _ in range(ROUNDS):
            execute(postgres.url, "CHECKPOINT")
            for case in cases:
                rounds[case.name].append(measure(case, postgres))
    print(f"{machine()}\nmedian of {ROUNDS} x {SECONDS} s (minimum to maximum)")
    report(rounds)


if __name__ == "__main__":
    main()
