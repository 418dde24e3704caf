"""Metrics, signups and files while workers start, stop and are killed."""

import itertools
import os
import resource
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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
        report = soak(service, url, replacements=6)
    # A reload runs old and new workers at once. Three files are the master's.
    assert report["files_after"] <= 13 * 2 * WORKERS + 3
    assert report["scrapes"]


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
