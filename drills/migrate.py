"""`make migrate-drill`: a million rows are migrated while an older service takes signups.

The table is that of the metrics guide's service. A backup's transaction is open when the migration
starts, and the migration is killed three times.
"""

import contextlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import requests

from testbed import ROOT
from testbed.database import Postgres, count_users, execute, session
from testbed.load import Signups
from testbed.service import Client, Service, user

GUIDE_TABLE = """
CREATE TABLE users (
    id         SERIAL PRIMARY KEY,
    email      VARCHAR(255) UNIQUE NOT NULL,
    first_name VARCHAR(100) NOT NULL,
    last_name  VARCHAR(100) NOT NULL,
    created_at TIMESTAMP DEFAULT CURRENT_TIMESTAMP,
    updated_at TIMESTAMP DEFAULT CURRENT_TIMESTAMP
)
"""
INSERT = "INSERT INTO users (email, first_name, last_name) VALUES ('{}', 'Ada', 'Lovelace')"
FILL = """
INSERT INTO users (email, first_name, last_name)
SELECT 'User' || n || '@Example.com', 'Ada', 'Lovelace' FROM generate_series(1, {}) n
"""
PEAK = re.compile(r"VmHWM:\s+(\d+) kB")
WAITING, PROGRESS, INDEX = "another transaction", "rows read", "building the unique index"


class OlderService(Signups):
    """Clients of an older service: each sends the guide's INSERT, over a new connection."""

    def __init__(self, url: str) -> None:
        super().__init__(Client(), clients=4, name="Old", valid=True)
        self._url = url

    def send(self, email: str, session: requests.Session | None) -> int:
        execute(self._url, INSERT.format(email))
        return 201


def run(url: str, *options: str, kill_at: str = "") -> tuple[int, int, str]:
    """Run the migration, and SIGKILL it once its output contains `kill_at`.

    Returns its status, the most memory it used in MB, and its output.
    """
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "signup.migrate", *options],
        cwd=ROOT,
        env={"DATABASE_URL": url},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    output, memory = "", [0]
    with process:
        assert process.stdout
        for line in process.stdout:
            output += line
            with contextlib.suppress(OSError):  # it has exited
                status = Path(f"/proc/{process.pid}/status").read_text()
                memory += [int(kilobytes) // 1024 for kilobytes in PEAK.findall(status)]
            if kill_at and kill_at in line:
                process.kill()
    return process.returncode, max(memory), output


def drill(
    postgres: Postgres, rows: int, kills: Iterable[str] = (PROGRESS, INDEX)
) -> dict[str, float]:
    """Migrate a table of `rows` rows under load, killed once at each line in `kills`.

    Returns what it did to the signups of the older service, the seconds of all runs together, the
    most megabytes of any run, the number of rows without the email_folded that a signup finds, and
    that of acknowledged signups that are not in the table.
    """
    url = postgres.new_database()
    execute(url, GUIDE_TABLE)
    execute(url, FILL.format(rows))
    with OlderService(url) as load:
        load.await_answers(100)
        started = time.monotonic()
        with session(url) as backup:
            backup.execute("BEGIN; SELECT FROM users LIMIT 1")
            runs = [run(url, kill_at=WAITING)]
        runs += [run(url, kill_at=line) for line in kills]
        assert all(status == -signal.SIGKILL for status, *_ in runs), runs
        runs.append(run(url))
        seconds = time.monotonic() - started
        load.await_answers(100)
    runs.append(run(url, "--finish"))
    assert [status for status, *_ in runs[-2:]] == [0, 0], runs
    stored = count_users(url)
    wrong = "SELECT count(*) FROM users WHERE email_folded IS DISTINCT FROM lower(email)"
    ((found,),) = execute(url, wrong)
    with Service(DATABASE_URL=url, WEB_CONCURRENCY="2") as service:
        for name, status in ((f"uSER{rows}", 409), ("old-0-0", 409), ("new", 201)):
            assert service.signup(json=user(name)).status_code == status
    return {
        "signups": len(load.acknowledged),
        "failed": load.unanswered.total(),
        "slowest": load.slowest,
        "seconds": seconds,
        "memory": max(megabytes for _, megabytes, _ in runs),
        "wrong": found,
        "lost": rows + len(load.acknowledged) - stored,
    }


def main() -> None:
    """Print what a migration of a million rows, or of as many as given, did to signups."""
    rows = int((*sys.argv, "1000000")[1])
    with Postgres(fsync=True) as postgres:
        for name, value in drill(postgres, rows).items():
            print(f"{name:8} {value:8.6g}")


if __name__ == "__main__":
    main()
