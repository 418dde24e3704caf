"""Metrics, signups and files while workers start, stop and are killed."""

import itertools
import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from drills.soak import WORKERS, soak
from testbed import wait_until
from testbed.database import count_users, locked_table
from testbed.load import Signups
from testbed.programs import is_alive
from testbed.service import USER, Service, project_copy, user


def test_worker_replacements_under_load_keep_totals_and_leak_no_files(url: str) -> None:
    with Service("--max-requests=100", DATABASE_URL=url, WEB_CONCURRENCY=str(WORKERS)) as service:
        report = soak(service, url, replacements=12)
    # A reload runs old and new workers at once. Three files are the master's.
    assert report.files_after <= 13 * 2 * WORKERS + 3
    assert report.scrapes > 30


def test_live_workers_never_share_metrics_files(url: str) -> None:
    with (  # on a slow machine, a reload takes longer than a statement may by default
        Service(DATABASE_URL=url, WEB_CONCURRENCY="3", DATABASE_STATEMENT_TIMEOUT="30") as service,
        ThreadPoolExecutor(1) as executor,
    ):
        # A worker that is stopped before it runs would not count as a start.
        service.wait_for(database_connections_max=25)
        with locked_table(url):
            # Its request in flight keeps an old worker alive beside the new ones.
            request = executor.submit(service.signup, json=USER)
            wait_until(lambda: service.metrics().get_value("signup_requests_in_flight"))
            service.process.send_signal(signal.SIGHUP)
            # All new workers have loaded the application, and only that old worker is left.
            service.wait_for(signup_worker_starts_total=3 + 3)
            wait_until(lambda: len(service.worker_pids()) == 3 + 1)
            wait_until(lambda: all(map(service.metric_files, service.worker_pids())))
            files = [service.metric_files(pid) for pid in service.worker_pids()]
            assert len(set.union(*files)) == sum(map(len, files))
        assert request.result().status_code == 201
        service.wait_for(signup_workers=3)
        assert service.metrics().get_value("signup_worker_starts_total") == 3 + 3
        service.check_equalities(count_users(url))


def test_gauges_of_a_killed_worker_are_dropped(url: str) -> None:
    with (
        Service(DATABASE_URL=url, WEB_CONCURRENCY="2", METRICS_SAMPLE_INTERVAL="0.05") as service,
        ThreadPoolExecutor(1) as executor,
    ):
        service.wait_for(signup_workers=2)
        oldest, other = service.worker_pids()
        with locked_table(url):
            os.kill(other, signal.SIGSTOP)  # the oldest worker gets the request
            request = executor.submit(service.signup, json=USER)
            wait_until(lambda: service.metrics().get_value("database_connections", state="in_use"))
            os.kill(other, signal.SIGCONT)
            service.process.send_signal(signal.SIGTTOU)  # stops the oldest worker, starts none
            wait_until(lambda: "Handling signal: ttou" in service.log())
            os.kill(oldest, signal.SIGKILL)
            service.wait_for(signup_workers=1)
            wait_until(lambda: not service.metrics().get_value("signup_requests_in_flight"))
            assert service.metrics().total("database_connections") == 0
        assert service.boots() == 2
        assert isinstance(request.exception(), requests.ConnectionError)


def test_term_finishes_requests_in_flight(url: str) -> None:
    with (
        Service(DATABASE_URL=url, WEB_CONCURRENCY="2") as service,
        ThreadPoolExecutor(4) as executor,
    ):
        with locked_table(url):
            users = [user(f"{n}") for n in range(4)]
            answers = [executor.submit(service.signup, json=user) for user in users]
            service.wait_for(signup_requests_in_flight=4)
            service.process.send_signal(signal.SIGTERM)
            wait_until(lambda: "Handling signal: term" in service.log())
        assert [answer.result().status_code for answer in answers] == [201] * 4
        assert service.wait() == 0
    assert count_users(url) == 4


def test_worker_that_gets_term_while_it_starts_stops(url: str) -> None:
    with Service(DATABASE_URL=url, WEB_CONCURRENCY="1") as service:
        (pid,) = service.worker_pids()
        for _ in range(5):
            os.kill(pid, signal.SIGTERM)
            wait_until(lambda: not is_alive(pid))
            (pid,) = wait_until(service.worker_pids)
            wait_until(lambda: service.metric_files(pid), pause=0)
        assert service.get("/healthz").status_code == 200


def test_process_metrics_sum_the_master_and_workers(url: str) -> None:
    with Service(DATABASE_URL=url, WEB_CONCURRENCY="2") as service:
        # Both workers have loaded the application and opened their files.
        service.wait_for(database_connections_max=25)
        before = service.metrics()
        pids = [service.process.pid, *service.worker_pids()]
        resident = sum(psutil.Process(pid).memory_info().rss for pid in pids)
        measured = before.get_value("process_resident_memory_bytes")
        assert measured == pytest.approx(resident, rel=0.1)
        files = sum(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in pids)
        assert before.get_value("process_open_fds") == pytest.approx(files, abs=5)
        started = before.get_value("process_start_time_seconds")
        assert 0 < time.time() - started < 120
        with Signups(service):
            wait_until(lambda: service.answers.total() > 300)
        worked = service.metrics().get_value("process_cpu_seconds_total")
        assert worked > before.get_value("process_cpu_seconds_total")
        # The CPU time of a dead worker stays counted.
        for pid in service.worker_pids():
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: service.boots() == 4)
        assert service.metrics().get_value("process_cpu_seconds_total") >= worked
        assert service.metrics().get_value("process_start_time_seconds") == started


def test_each_master_has_its_own_folder_in_the_configured_one(url: str, tmp_path: Path) -> None:
    (tmp_path / "counter_7.db").write_text("mine")
    named: dict[str, Any] = {"DATABASE_URL": url, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    with Service(**named) as service:
        folder = service.metrics_folder()
        assert folder.parent == tmp_path
        service.signup(json=USER)
        with Service(**named) as second:
            assert second.metrics_folder().parent == tmp_path
            assert second.metrics().total("signup_requests_total") == 0
        assert service.metrics().total("signup_requests_total") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["counter_7.db"]


def test_metrics_folder_is_removed_by_its_master_or_the_next(url: str, tmp_path: Path) -> None:
    # A separate parent folder: every starting service removes leftover folders.
    named: dict[str, Any] = {"DATABASE_URL": url, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    with Service(**named) as service:
        folder = service.metrics_folder()
        service.stop()
        assert not folder.exists()
    with Service(**named) as killed:
        left_over = killed.metrics_folder()
        workers = killed.worker_pids()
        killed.stop(signal.SIGKILL)
        wait_until(lambda: not any(map(is_alive, workers)))  # they notice and exit
        assert left_over.exists()
    with Service(**named):
        assert not left_over.exists()


@pytest.mark.parametrize("what", ["folder", "files"])
def test_removed_metrics_folder_fails_scrapes_until_the_next_fork(url: str, what: str) -> None:
    with Service(DATABASE_URL=url, WEB_CONCURRENCY="2") as service:
        service.wait_for(database_connections_max=25)
        assert service.signup(json=USER).status_code == 201
        folder = service.metrics_folder()
        if what == "folder":
            shutil.rmtree(folder)
        else:
            for file in folder.iterdir():
                file.unlink()
        for _ in range(8):
            response = service.get("/metrics")
            assert response.status_code == 500
            assert response.json() == {"error": "internal server error"}
            assert service.signup(json=USER).status_code == 409  # signups still work
        old = service.worker_pids()
        os.kill(old[0], signal.SIGKILL)
        # The next fork recreates the folder and replaces all workers. Their counts restart at 0.
        statuses = set()

        def recovered() -> bool:
            response = service.get("/metrics")
            statuses.add(response.status_code)
            done = not any(map(is_alive, old)) and "database_connections_max 24.0" in response.text
            return response.status_code == 200 and done

        wait_until(recovered)
        assert statuses <= {200, 500}
        service.answers.clear()
        for number in range(8):
            assert service.signup(json=user(f"again{number}")).status_code == 201
        now = service.quiet_metrics()
        assert now.total("signup_requests_total") == 8
        assert now.get_value("signup_workers") == 2


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Path]:
    """Mount a tmpfs with room for the files of two workers."""
    options = ["-t", "tmpfs", "-o", f"size={(3 + 10 + 2 * 13) * 32 + 64}k", "tmpfs", str(tmp_path)]
    if subprocess.run(["mount", *options], capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs (root)")
    yield tmp_path
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


def test_full_metrics_folder_stops_the_service_with_one_error(url: str, full: Path) -> None:
    env: dict[str, Any] = {"DATABASE_URL": url, "PROMETHEUS_MULTIPROC_DIR": str(full)}
    with Service(WEB_CONCURRENCY="2", **env) as service:
        service.wait_for(signup_workers=2)
        service.wait_for(database_connections_max=25)
        assert service.signup(json=USER).status_code == 201
        service.check_equalities(1)  # scrapes are exact
        service.process.send_signal(signal.SIGTTIN)
        assert service.wait() == 1
        assert service.boots() == 2
        (reason,) = [line for line in service.log().splitlines() if "No space left" in line]
        assert "PROMETHEUS_MULTIPROC_DIR" in reason


def test_worker_killed_before_it_has_loaded_counts_as_a_start(url: str) -> None:
    with project_copy() as project:
        hold, app = project / "hold", project / "app.py"
        wait = "import os, time\nwhile os.path.exists('hold'):\n    time.sleep(0.02)\n"
        app.write_text(wait + app.read_text())
        with Service(project=project, DATABASE_URL=url, WEB_CONCURRENCY="2") as service:
            service.wait_for(signup_workers=2, signup_worker_starts_total=2)
            hold.touch()
            for starts in (3, 4):
                os.kill(max(service.worker_pids()), signal.SIGKILL)
                service.wait_for(signup_workers=1, signup_worker_starts_total=starts)
            hold.unlink()
            service.wait_for(signup_workers=2, signup_worker_starts_total=4)


def test_worker_recovers_from_running_out_of_file_descriptors(url: str) -> None:
    with Service(DATABASE_URL=url, WEB_CONCURRENCY="1", METRICS_SAMPLE_INTERVAL="0.05") as service:
        (worker,) = service.worker_pids()
        soft, hard = resource.prlimit(worker, resource.RLIMIT_NOFILE)
        assert soft == hard  # raised at the start
        with requests.Session() as session:
            assert session.get(service.url + "/healthz").status_code == 200
            process = psutil.Process(worker)
            wait_until(lambda: len(process.net_connections()) == 2)  # this one and the listener
            used = {int(link.name) for link in Path(f"/proc/{worker}/fd").iterdir()}
            free = next(number for number in itertools.count() if number not in used)
            resource.prlimit(worker, resource.RLIMIT_NOFILE, (free, hard))
            for number in range(40):  # more than the pool's connections
                body = user(f"{number}")
                assert service.signup(json=body, session=session).status_code == 500
            resource.prlimit(worker, resource.RLIMIT_NOFILE, (soft, hard))
        with ThreadPoolExecutor(30) as executor, locked_table(url):
            users = [user(f"{number}") for number in range(30)]
            answers = [executor.submit(service.signup, json=user) for user in users]
            wait_until(
                lambda: service.metrics().total("database_connections", state="in_use") == 25
            )
        assert {answer.result().status_code for answer in answers} == {201}
        service.check_equalities(30)
