"""`make soak`: replaces workers under load, and prints the effect on metrics and scrapes.

It soaks the service, and a foreign one with slots.py and with the library's files per process id.
"""

import os
import random
import signal
import sys
from contextlib import suppress

import requests

from testbed import wait_until
from testbed.database import Postgres, count_users
from testbed.foreign import Foreign, Hits
from testbed.load import Scraper, Signups, scrape_time
from testbed.service import Service

WORKERS = 3
CLIENTS = 8
SCRAPERS = 2
Report = dict[str, float]  # the figures of a soak; scrape times in seconds


def soak(service: Service, url: str, replacements: int, may_fail: bool = False) -> Report:
    """Replace workers by SIGKILL, HUP and max_requests until `replacements` have been made.

    Meanwhile clients send requests, every scrape must parse, and no counter may decrease. Then the
    counters are compared with the clients' counts and signup's table. A killed worker sends no
    response to its requests in flight, yet may have counted them and committed their rows. So the
    numbers differ by at most the requests without a response: at most CLIENTS per kill. A scrape
    gets a 500 only if it `may_fail`: the library's own files are empty for a moment when created.
    """
    chance = random.Random(1)
    wait_for_workers(service)
    service.reload()  # so that the baseline includes the extra slots of a reload
    wait_for_workers(service)
    files, duration = _count_files(service), scrape_time(service, times=replacements)
    start, kills = service.boots(), 0
    load = Hits(service, CLIENTS) if isinstance(service, Foreign) else Signups(service, CLIENTS)
    with load, Scraper(service, SCRAPERS) as scraper:
        while service.boots() - start < replacements:
            if chance.random() < 0.3:
                service.reload()
            else:
                os.kill(chance.choice(service.worker_pids()), signal.SIGKILL)
                kills += 1
            wait_for_workers(service)
            answered = service.answers.total()
            wait_until(lambda: service.answers.total() > answered + 50)
    report: Report = {
        "replacements": service.boots() - start,
        "kills": kills,
        "responses": service.answers.total(),
        "counted": service.quiet_metrics().total(service.requests),
        "unanswered": load.unanswered.total(),
        "scrapes": scraper.count,
        "scrapes_unanswered": scraper.unanswered,
        "scrapes_failed": scraper.failed,
        "files_before": files,
        "files_after": _count_files(service),
        "scrape_before": duration,
        "scrape_after": scrape_time(service, times=replacements),
    }
    assert may_fail or not scraper.failed, service.log()
    assert report["unanswered"] <= kills * CLIENTS
    assert scraper.unanswered <= kills * SCRAPERS
    if isinstance(service, Foreign):
        service.check(load.unanswered.total())
    else:
        _check(service, url, load.unanswered.total())
    return report


def _check(service: Service, url: str, unanswered: int) -> None:
    now = service.quiet_metrics()
    for status, answers in service.answers.items():
        counted = now.total("signup_requests_total", status_code=str(status))
        assert answers <= counted <= answers + unanswered
    total, responses = now.total("signup_requests_total"), service.answers.total()
    assert responses <= total <= responses + unanswered
    # A kill may come after the duration is counted and before the request is.
    assert total <= now.total("signup_request_duration_seconds_count") <= total + unanswered
    created = now.total("signup_requests_total", status_code="201")
    assert created <= count_users(url) <= created + unanswered


def wait_for_workers(service: Service) -> None:
    def complete() -> bool:
        with suppress(requests.RequestException):  # the scrapers count these
            return service.metrics().total(service.workers) == WORKERS
        return False

    wait_until(complete)


def _count_files(service: Service) -> int:
    return len(list(service.metrics_folder().glob("*.db")))


def main(replacements: int) -> None:
    options = ("-kgevent", "--max-requests=300", f"--workers={WORKERS}")
    with Postgres(fsync=True) as postgres:
        url = postgres.new_database()
        with Service(*options, DATABASE_URL=url) as service:
            reports = {"signup": soak(service, url, replacements)}
    for name, stock in (("slots.py", False), ("library", True)):
        with Foreign(*options, stock=stock, PROMETHEUS_MULTIPROC_DIR="metrics") as foreign:
            reports[name] = soak(foreign, "", replacements, may_fail=stock)
    print(" " * 19, *(f"{name:>12}" for name in reports), sep="  ")
    for figure in reports["signup"]:
        values = (report[figure] for report in reports.values())
        print(f"{figure:<19}", *(f"{value:12.6g}" for value in values), sep="  ")


if __name__ == "__main__":
    main(int(sys.argv[1]))
