"""The service as users run it: gunicorn, several workers, many clients."""

import contextlib
import os
import shutil
import signal
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from testbed import wait_until
from testbed.database import count_users
from testbed.load import Signups
from testbed.postgres import home_for
from testbed.programs import is_alive
from testbed.service import USER, Service, project_copy, user

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


def test_no_postgresql_is_left_running_when_the_port_is_taken(project: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(AssertionError, match="Address already in use"):
            Service(f"--bind={address}", project=project).__enter__()
    assert not (home_for(project) / "data" / "postmaster.pid").exists()


def test_ctrl_c_stops_workers_that_were_already_signalled(database_url: str) -> None:
    with Service(DATABASE_URL=database_url, WEB_CONCURRENCY="4") as service:
        service.signup("GET")
        for pid in service.worker_pids():
            for number in (signal.SIGINT, signal.SIGQUIT) * 10:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
        assert service.press_ctrl_c() == 0
        assert "was sent SIGKILL" not in service.log()


@pytest.mark.parametrize(
    "start",
    [
        *(b"P", post(GOOD)[:40], post(GOOD)[:-40], chunks(CHUNKED)[:90]),
        chunks(CHUNKED)[: -len(CHUNKED) + 1],  # stops inside a chunk size
        *(length(b"999999", b"{"), chunks(b"ffffff\r\n")),  # refused at once; the client goes on
        get(b"Connection: close", target=b"/"),  # client side stays open
        HIDDEN + post(GOOD)[:40],  # a complete request and a part of another
    ],
)
def test_slow_clients_do_not_block_others(service: Service, start: bytes) -> None:
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(service.connect()) for _ in range(100)]  # on four workers
        for client in slow:
            client.sendall(start)
        for _ in range(20):
            assert service.get("/healthz").status_code == 200
            for client in slow:
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    client.send(b"x")


def descendants(pid: int) -> list[int]:
    """Return the process ids of all descendants."""
    return [child.pid for child in psutil.Process(pid).children(recursive=True)]


def server_pid(project: Path) -> int:
    return int((home_for(project) / "data" / "postmaster.pid").read_text().splitlines()[0])
