"""The service as users run it: gunicorn, several workers, many clients."""

import contextlib
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from testbed import wait_until
from testbed.database import count_users
from testbed.load import Signups
from testbed.postgres import EmbeddedPostgres, home_for
from testbed.programs import is_alive
from testbed.service import GUNICORN, USER, Service, project_copy, user

from .test_hostile import CHUNKED, GOOD, HIDDEN, chunks, get, length, post


def test_example_and_concurrent_traffic_counts_exactly(service: Service, database_url: str) -> None:
    emails = ("test@example.com", "invalid", "duplicate@example.com", "duplicate@example.com")
    statuses = [service.signup(json=USER | {"email": email}).status_code for email in emails]
    assert statuses == [201, 400, 201, 409]

    with Signups(service, clients=20) as load:
        wait_until(lambda: service.answers.total() > 300)
    assert not load.unanswered
    assert service.answers.keys() == {201, 400, 409}
    service.check_equalities(count_users(database_url))
    inserts = service.quiet_metrics().total("database_query_duration_seconds_count")
    assert inserts == service.answers[201] + service.answers[409]


@pytest.fixture(scope="module")
def project() -> Iterator[Path]:
    """Copy the project; it starts its own embedded PostgreSQL, as under `make run`."""
    with project_copy() as project:
        yield project


def test_embedded_database_keeps_its_data_and_leaves_folder_modes_alone(project: Path) -> None:
    folders = [project, *project.parents, Path(shutil.__file__).parent]
    before = [stat.S_IMODE(folder.stat().st_mode) for folder in folders]
    for status, stop in ((201, Service.press_ctrl_c), (409, Service.stop)):
        with Service(project=project, WEB_CONCURRENCY="2") as service:
            assert f"data in {home_for(project)}" in service.log()
            assert service.signup(json=user("outlives")).status_code == status
            pids = [*descendants(service.process.pid), server_pid(project)]
            assert len(pids) == 4  # the master, two workers, and the database
            assert stop(service) == 0
            wait_until(lambda: not any(map(is_alive, pids)))
            assert "Shutting down" in service.log()
            assert "Traceback" not in service.log()
    assert [stat.S_IMODE(folder.stat().st_mode) for folder in folders] == before


def test_libpq_variables_of_the_user_do_not_reach_the_embedded_database(project: Path) -> None:
    with Service(
        project=project,
        WEB_CONCURRENCY="1",
        PGHOST="nowhere.invalid",
        PGUSER="stranger",
        PGOPTIONS="-c default_transaction_read_only=on",
        PGSERVICE="other",
    ) as own:
        assert own.signup(json=user("variables")).status_code == 201
        own.check_equalities(rows=1)
        for pid in descendants(own.process.pid):
            environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            assert not [variable for variable in environ if variable.startswith(b"PG")]


def test_embedded_database_runs_until_its_last_service_stops(project: Path) -> None:
    with Service(project=project) as second:
        with Service(project=project) as first:
            first.stop()
        assert second.get("/readyz").status_code == 200
        pid = server_pid(project)
    wait_until(lambda: not is_alive(pid))


@pytest.mark.parametrize(
    ("line", "number"),
    [
        ('exec env --default-signal=HUP "$@"', signal.SIGHUP),  # the terminal is closed
        ('"$@"; true', signal.SIGKILL),  # the parent process, in `make run` make, is killed
    ],
)
def test_make_run_stops_with_its_terminal_and_with_make(
    project: Path, line: str, number: int
) -> None:
    service = Service(project=project, WEB_CONCURRENCY="1")
    service._command = ["sh", "-c", line, "sh", *service._command]
    with service:
        pids = [*descendants(service.process.pid), server_pid(project)]
        service.stop(number)
        wait_until(lambda: not any(map(is_alive, pids)))


def test_next_service_goes_on_with_the_database_of_a_killed_one(project: Path) -> None:
    with Service(project=project, WEB_CONCURRENCY="1") as service:
        workers, server = descendants(service.process.pid), server_pid(project)
        service.stop(signal.SIGKILL)
        wait_until(lambda: not any(map(is_alive, workers)))
    with Service(project=project, WEB_CONCURRENCY="1"):
        assert server_pid(project) == server
    # The machine stops, and a process of the same user gets the number of the server.
    postgres = EmbeddedPostgres(home_for(project))
    with subprocess.Popen(["sleep", "600"], **postgres.account()) as other:
        fields = [other.pid, postgres.data, 1, 5432, home_for(project) / "socket"]
        (postgres.data / "postmaster.pid").write_text("\n".join(map(str, fields)))
        with Service(project=project, WEB_CONCURRENCY="1"):
            assert server_pid(project) != other.pid
        other.kill()


def test_make_run_refuses_a_taken_port_in_one_line_and_starts_nothing(project: Path) -> None:
    command = [sys.executable, "-m", "testbed.postgres", *GUNICORN, "app:app"]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        env = os.environ | {"PORT": port}
        done = subprocess.run(command, cwd=project, env=env, capture_output=True, text=True)
    what = f"PORT {port}: Address already in use; choose another: PORT=... make run\n"
    assert (done.returncode, done.stderr) == (1, what)


def test_slow_clients_do_not_block_others(service: Service) -> None:
    starts = (
        *(b"P", post(GOOD)[:40], post(GOOD)[:-40], chunks(CHUNKED)[:90]),
        chunks(CHUNKED)[: -len(CHUNKED) + 1],  # stops inside a chunk size
        *(length(b"999999", b"{"), chunks(b"ffffff\r\n")),  # refused at once; the client goes on
        get(b"Connection: close", target=b"/"),  # client side stays open
        HIDDEN + post(GOOD)[:40],  # a complete request and a part of another
    )
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(service.connect()) for _ in starts * 50]  # on four workers
        for client, start in zip(slow, starts * 50, strict=True):
            client.sendall(start)
        for _ in range(20):
            assert service.get("/healthz").status_code == 200
            for client in slow:
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    client.send(b"x")


def descendants(pid: int) -> list[int]:
    return [child.pid for child in psutil.Process(pid).children(recursive=True)]


def server_pid(project: Path) -> int:
    return int((home_for(project) / "data" / "postmaster.pid").read_text().splitlines()[0])
