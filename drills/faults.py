"""`make fault-drill`: causes every database fault under load, and prints what clients saw.

The faults are those of testbed/faults.py. Finally, PostgreSQL is killed while clients sign up.
"""

import json
import signal
import time
from collections import Counter, defaultdict
from datetime import datetime
from itertools import pairwise
from typing import Any, NamedTuple

from testbed import wait_until
from testbed.database import Postgres, stored_emails
from testbed.faults import FAULTS
from testbed.load import Signups
from testbed.service import Service, user

# Low, to keep the drill short; a response takes at most their sum plus 1 s.
TIMEOUTS: dict[str, Any] = {"DATABASE_POOL_TIMEOUT": "1", "DATABASE_STATEMENT_TIMEOUT": "1"}


class Report(NamedTuple):
    """What clients and probes saw of one fault; times in seconds."""

    answers: Counter[int]
    slowest: float
    readyz: int
    healthz: int
    causes: set[str]
    recovery: float
    ready_seconds: float


def fault_drill(
    service: Service, postgres: Postgres, url: str, fault: str, failures: int
) -> Report:
    """Cause `fault` under load until `failures` requests have failed, and wait for recovery.

    Every failure must be counted as a database error, every cause logged at most once per second
    by each worker, and every acknowledged email stored.
    """
    assert _can_sign_up(service)  # so that a connection is open
    before, counted = service.answers.copy(), _database_errors(service)
    logged = len(service.log())
    with FAULTS[fault](postgres, url):
        with Signups(service) as load:
            wait_until(lambda: _failed(service.answers - before) >= failures, timeout=60)
        asked = time.perf_counter()
        readyz = service.get("/readyz").status_code
        ready_seconds = time.perf_counter() - asked
        healthz = service.get("/healthz").status_code
    answers = service.answers - before
    ended = time.perf_counter()
    wait_until(lambda: service.get("/readyz").status_code == 200)
    wait_until(lambda: _can_sign_up(service))
    recovery = time.perf_counter() - ended
    assert not load.unanswered
    assert _database_errors(service) - counted == _failed(service.answers - before)
    causes = _check_causes(service.log()[logged:])
    assert stored_emails(postgres.admin_url(url)).issuperset(load.acknowledged)
    return Report(answers, load.slowest, readyz, healthz, causes, recovery, ready_seconds)


def durability_drill(
    service: Service, postgres: Postgres, url: str, signups: int
) -> tuple[int, int]:
    """SIGKILL PostgreSQL three times under load, until `signups` have been acknowledged.

    Returns the number of acknowledged emails, and how many of these are not in the table.
    """
    with Signups(service) as load:
        for goal in (signups // 3, signups * 2 // 3, signups):
            wait_until(lambda: len(load.acknowledged) >= goal, timeout=300)
            postgres.signal(signal.SIGKILL)
            postgres.restart()
    stored = stored_emails(postgres.admin_url(url))
    return len(load.acknowledged), len(set(load.acknowledged) - stored)


def _failed(answers: Counter[int]) -> int:
    return sum(count for status, count in answers.items() if status >= 500)


def _can_sign_up(service: Service) -> bool:
    return service.signup(json=user(f"again-{time.time_ns()}")).status_code == 201


def _database_errors(service: Service) -> float:
    return service.quiet_metrics().get_value("signup_errors_total", error_type="database")


def _check_causes(log: str) -> set[str]:
    times = defaultdict(list)
    for event in map(json.loads, log.splitlines()):
        if event["message"].startswith("database: "):
            cause = event["pid"], event["message"]
            times[cause].append(datetime.fromisoformat(event["time"]))
    pauses = [b - a for moments in times.values() for a, b in pairwise(moments)]
    assert times and all(pause.total_seconds() > 0.9 for pause in pauses)
    return {message for _, message in times}


def main() -> None:
    with Postgres(fsync=True) as postgres:
        url = postgres.new_database()
        with Service(DATABASE_URL=url, WEB_CONCURRENCY="2", **TIMEOUTS) as service:
            print("fault                 responses                 slowest  readyz  recovery")
            for fault in FAULTS:
                report = fault_drill(service, postgres, url, fault, failures=200)
                answers = ", ".join(f"{n} x {status}" for status, n in report.answers.items())
                times = f"{report.slowest:5.2f} s  {report.readyz:6}  {report.recovery:6.2f} s"
                print(f"{fault:20}  {answers:24}  {times}")
                for cause in sorted(report.causes):
                    print(f"  {cause}", flush=True)
            acknowledged, missing = durability_drill(service, postgres, url, signups=2000)
            present = acknowledged - missing
            print(f"killed: acknowledged {acknowledged}, present {present}, missing {missing}")


if __name__ == "__main__":
    main()
