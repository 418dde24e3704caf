"""`make soak`: replaces workers under load, and prints the effect on metrics and scrapes.

It soaks the service as it is, and with the library's default: a set of files per process id.
"""

import os
import random
import signal
import sys
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path

import requests

from testbed import wait_until
from testbed.database import Postgres, count_users
from testbed.load import Scraper, Signups, scrape_time
from testbed.service import Service

WORKERS = 4
CLIENTS = 8
SCRAPERS = 2
PID_FILES = str(Path(__file__).with_name("pid_files.conf.py"))


@dataclass
class Report:
    """The result of a soak; scrape times in seconds."""

    replacements: int
    kills: int
    responses: int
    unanswered: int
    scrapes: int
    scrapes_unanswered: int
    scrapes_failed: int
    files_before: int
    files_after: int
    scrape_before: float
    scrape_after: float


def soak(service: Service, url: str, replacements: int, may_fail: bool = False) -> Report:
    """Replace workers by SIGKILL, HUP and max_requests until `replacements` have been made.

    Meanwhile clients sign up, every scrape must parse, and no counter may decrease. Then the
    service's counters are compared with the clients' counts and the table. A killed worker sends no
    response to its requests in flight, yet may have counted them and committed their rows. So the
    numbers differ by at most the requests without a response: at most CLIENTS per kill. A scrape
    gets a 500 only if it `may_fail`: the library's own files are empty for a moment when created.
    """
    chance = random.Random(1)
    service.reload()  # so that the baseline includes the extra slots of a reload
    _wait_for_workers(service)
    files, duration = _count_files(service), scrape_time(service)
    start = service.boots()
    kills = 0
    with Signups(service, CLIENTS) as load, Scraper(service, SCRAPERS) as scraper:
        while service.boots() - start < replacements:
            if chance.random() < 0.3:
                service.reload()
            else:
                os.kill(chance.choice(service.worker_pids()), signal.SIGKILL)
                kills += 1
            _wait_for_workers(service)
            answered = service.answers.total()
            wait_until(lambda: service.answers.total() > answered + 50)
    report = Report(
        replacements=service.boots() - start,
        kills=kills,
        responses=service.answers.total(),
        unanswered=load.unanswered.total(),
        scrapes=scraper.count,
        scrapes_unanswered=scraper.unanswered,
        scrapes_failed=scraper.failed,
        files_before=files,
        files_after=_count_files(service),
        scrape_before=duration,
        scrape_after=scrape_time(service),
    )
    assert may_fail or not report.scrapes_failed, service.log()
    _check(service, url, report)
    return report


def _check(service: Service, url: str, report: Report) -> None:
    assert report.unanswered <= report.kills * CLIENTS
    assert report.scrapes_unanswered <= report.kills * SCRAPERS
    now = service.quiet_metrics()
    counted = {s: now.total("signup_requests_total", status_code=str(s)) for s in service.answers}
    for status, answers in service.answers.items():
        assert answers <= counted[status] <= answers + report.unanswered
    total = now.total("signup_requests_total")
    assert report.responses <= total <= report.responses + report.unanswered
    # A kill may come after the duration is counted and before the request is.
    assert total <= now.total("signup_request_duration_seconds_count") <= total + report.unanswered
    rows = count_users(url)
    assert counted[201] <= rows <= counted[201] + report.unanswered


def _wait_for_workers(service: Service) -> None:
    def complete() -> bool:
        with suppress(requests.HTTPError):  # the scrapers count these
            return service.metrics().get_value("signup_workers") == WORKERS
        return False

    wait_until(complete)


def _count_files(service: Service) -> int:
    return len(list(service.metrics_folder().glob("*.db")))


def main(replacements: int) -> None:
    """Print the results with slots, and with a set of files per process id."""
    reports = {}
    with Postgres() as postgres:
        for name, options in (("slot", []), ("process id", ["--config", PID_FILES])):
            url = postgres.new_database()
            with Service(
                "--max-requests=300", *options, DATABASE_URL=url, WEB_CONCURRENCY=str(WORKERS)
            ) as service:
                reports[name] = soak(service, url, replacements, may_fail=bool(options))
    print("one file set per   ", *(f"{name:>12}" for name in reports), sep="  ")
    for figure in fields(Report):
        values = (getattr(report, figure.name) for report in reports.values())
        print(f"{figure.name:<19}", *(f"{value:12.6g}" for value in values), sep="  ")


if __name__ == "__main__":
    main(int(sys.argv[1]))
