"""What stays true while workers come and go."""

import contextlib
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests

from benchmarks.soak import WORKERS, soak

from .load import Load
from .service import Postgres, Service, execute, is_alive, locked_table, wait_until

USER = {"email": "ada@example.com", "first_name": "Ada", "last_name": "Lovelace"}


def rows(url: str) -> int:
    return int(execute(url, "SELECT count(*) FROM users")[0][0])


@pytest.fixture
def url(postgres: Postgres) -> str:
    return postgres.new_database()


def test_replacements_of_all_sorts_under_load(url: str) -> None:
    with Service("--max-requests=100", DATABASE_URL=url, WEB_CONCURRENCY=str(WORKERS)) as service:
        report = soak(service, url, replacements=30)
    assert report.files_after <= 3 * 2 * WORKERS  # a reload has old and new workers at once
    assert report.scrapes > 30


def test_reloads_and_recycling_lose_no_request(url: str) -> None:
    with Service("--max-requests=200", DATABASE_URL=url, WEB_CONCURRENCY="3") as service:
        with Load(service) as load:
            for _ in range(2):
                booted = service.boots()
                service.process.send_signal(signal.SIGHUP)
                wait_until(lambda: service.boots() >= booted + 3)  # noqa: B023
            booted = service.boots()
            wait_until(lambda: service.boots() >= booted + 4)  # by max_requests
        assert not load.unanswered
        service.check_equalities(rows(url))


def test_connections_are_shared_out_evenly(url: str) -> None:
    with (
        Service(DATABASE_URL=url, WEB_CONCURRENCY="2") as service,
        contextlib.ExitStack() as clients,
        ThreadPoolExecutor(20) as executor,
    ):
        wait_until(lambda: service.metrics().get_value("signup_worker_starts_total") == 2)
        sessions = [clients.enter_context(requests.Session()) for _ in range(20)]
        answers = executor.map(lambda session: session.get(service.url), sessions)
        assert all(answer.status_code == 200 for answer in answers)
        shares = [
            sum(file.name.startswith("socket:") for file in service.open_files(pid))
            for pid in service.worker_pids()
        ]
        assert min(shares) >= 8, shares  # the listener is one of them


def test_live_workers_never_share_a_slot(url: str) -> None:
    with (
        Service(DATABASE_URL=url, WEB_CONCURRENCY="3") as service,
        ThreadPoolExecutor(1) as executor,
    ):
        # One that is not there yet when it is to end again would not count as a start.
        wait_until(lambda: service.metrics().get_value("signup_worker_starts_total") == 3)
        with locked_table(url):
            # What it is working on keeps an old worker alive beside the new ones.
            request = executor.submit(service.signup, json=USER)
            wait_until(lambda: service.metrics().get_value("signup_requests_in_flight"))
            service.process.send_signal(signal.SIGHUP)
            # All new ones have loaded the application, and of the old ones that one is left.
            wait_until(lambda: service.metrics().get_value("signup_worker_starts_total") == 3 + 3)
            wait_until(lambda: service.metrics().get_value("signup_workers") == 3 + 1)
            files = [service.metric_files(pid) for pid in service.worker_pids()]
            assert len(files) == 4
            assert all(files)
            assert len(set.union(*files)) == sum(map(len, files))
        assert request.result().status_code == 201
        wait_until(lambda: service.metrics().get_value("signup_workers") == 3)
        assert service.metrics().get_value("signup_worker_starts_total") == 3 + 3
        service.check_equalities(rows(url))


def test_live_gauges_drop_with_their_worker(url: str) -> None:
    with (
        Service(DATABASE_URL=url, WEB_CONCURRENCY="2", METRICS_SAMPLE_INTERVAL="0.05") as service,
        ThreadPoolExecutor(1) as executor,
    ):
        wait_until(lambda: service.metrics().get_value("signup_workers") == 2)
        oldest, other = service.worker_pids()
        with locked_table(url):
            os.kill(other, signal.SIGSTOP)  # so that the oldest one gets the request
            request = executor.submit(service.signup, json=USER)
            wait_until(lambda: service.metrics().get_value("database_connections", state="in_use"))
            os.kill(other, signal.SIGCONT)
            service.process.send_signal(signal.SIGTTOU)  # ends the oldest one, and starts no other
            wait_until(lambda: "Handling signal: ttou" in service.log())
            os.kill(oldest, signal.SIGKILL)
            wait_until(lambda: service.metrics().get_value("signup_workers") == 1)
            wait_until(lambda: not service.metrics().get_value("signup_requests_in_flight"))
            assert service.metrics().total("database_connections") == 0
        assert service.boots() == 2
        assert isinstance(request.exception(), requests.ConnectionError)


def test_term_finishes_what_is_in_flight(url: str) -> None:
    with (
        Service(DATABASE_URL=url, WEB_CONCURRENCY="2") as service,
        ThreadPoolExecutor(4) as executor,
    ):
        with locked_table(url):
            users = [USER | {"email": f"{n}@example.com"} for n in range(4)]
            answers = [executor.submit(service.signup, json=user) for user in users]
            wait_until(lambda: service.metrics().get_value("signup_requests_in_flight") == 4)
            service.process.send_signal(signal.SIGTERM)
            wait_until(lambda: "Handling signal: term" in service.log())
        assert [answer.result().status_code for answer in answers] == [201] * 4
        assert service.wait() == 0
    assert rows(url) == 4


def test_a_worker_that_is_told_to_end_while_it_starts_ends(url: str) -> None:
    with Service(DATABASE_URL=url, WEB_CONCURRENCY="1") as service:
        (pid,) = service.worker_pids()
        for _ in range(5):
            os.kill(pid, signal.SIGTERM)
            wait_until(lambda: not is_alive(pid))  # noqa: B023
            (pid,) = wait_until(service.worker_pids)
            wait_until(lambda: service.metric_files(pid), pause=0)  # noqa: B023
        assert service.get("/healthz").status_code == 200


def test_the_process_metrics_are_those_of_master_and_workers(url: str) -> None:
    with Service(DATABASE_URL=url, WEB_CONCURRENCY="2") as service:
        # Both have loaded the application, and so have their files open.
        wait_until(lambda: service.metrics().get_value("signup_worker_starts_total") == 2)
        before = service.metrics()
        pids = [service.process.pid, *service.worker_pids()]
        resident = sum(proc_kilobytes(pid, "VmRSS") for pid in pids) * 1024
        measured = before.get_value("process_resident_memory_bytes")
        assert measured == pytest.approx(resident, rel=0.1)
        files = sum(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in pids)
        assert before.get_value("process_open_fds") == pytest.approx(files, abs=5)
        started = before.get_value("process_start_time_seconds")
        assert 0 < time.time() - started < 120
        with Load(service):
            wait_until(lambda: service.answers.total() > 300)
        worked = service.metrics().get_value("process_cpu_seconds_total")
        assert worked > before.get_value("process_cpu_seconds_total")
        # What a worker has used stays counted when it is gone.
        for pid in service.worker_pids():
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: service.boots() == 4)
        assert service.metrics().get_value("process_cpu_seconds_total") >= worked
        assert service.metrics().get_value("process_start_time_seconds") == started


def proc_kilobytes(pid: int, name: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1])
    raise KeyError(name)


def test_a_named_folder_loses_only_its_metrics(url: str, tmp_path: Path) -> None:
    (tmp_path / "counter_7.db").write_text("old")
    (tmp_path / "notes.txt").write_text("mine")
    folder = {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    named = {"DATABASE_URL": url, "WEB_CONCURRENCY": "1"} | folder
    with Service(**named) as service:
        assert service.metrics_folder() == tmp_path
        assert not (tmp_path / "counter_7.db").exists()
        (tmp_path / "counter_9.db").touch()  # a worker that is starting: the scrape goes on
        service.signup(json=USER)
        files = set(tmp_path.iterdir())
        with Service(**named) as second:
            assert second.metrics_folder() != tmp_path
            assert second.metrics().total("signup_requests_total") == 0
        assert set(tmp_path.iterdir()) == files
        assert service.metrics().total("signup_requests_total") == 1
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_private_folder_goes_with_its_master_or_the_next_one(url: str) -> None:
    with Service(DATABASE_URL=url) as service:
        private = service.metrics_folder()
        service.stop()
        assert not private.exists()
    with Service(DATABASE_URL=url) as killed:
        left_over = killed.metrics_folder()
        workers = killed.worker_pids()
        killed.stop(signal.SIGKILL)
        wait_until(lambda: not any(map(killed.metric_files, workers)))  # they notice and end
        assert left_over.exists()
    with Service(DATABASE_URL=url):
        assert not left_over.exists()


def test_an_upgrade_by_usr2_keeps_the_folders_apart(url: str) -> None:
    with Service(DATABASE_URL=url, WEB_CONCURRENCY="2") as service:
        service.signup(json=USER)
        folder = service.metrics_folder()
        service.process.send_signal(signal.SIGUSR2)
        # The new master is a child of the old one, and not one of its workers.
        wait_until(lambda: service.log().count("signup service on") == 2 and service.boots() == 4)
        assert service.metrics().get_value("signup_workers") == 2
        assert folder.exists()
        assert service.stop() == 0
        assert not folder.exists()
        for _ in range(10):
            assert service.metrics().total("signup_requests_total") == 0
            assert service.metrics().get_value("signup_workers") == 2
        assert service.signup(json=USER).status_code == 409
