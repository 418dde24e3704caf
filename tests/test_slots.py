"""slots.py as a stranger uses it: testbed/foreign has nothing else of this project."""

import fcntl
import os
import pwd
import signal
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from drills.soak import WORKERS, soak, wait_for_workers
from testbed import wait_until
from testbed.foreign import Foreign, Hits
from testbed.load import Scraper
from testbed.service import GUNICORN, Samples, refused_start

from .test_gunicorn import python_for

VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
SLOTS = 2 * WORKERS  # a reload runs old and new workers at once
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may change users")


def gauges_are_right(now: Samples, workers: int) -> bool:
    """Return whether live gauges are of live workers, and others have the last of each slot."""
    right = {"all": SLOTS, "sum": SLOTS, "liveall": workers, "livesum": workers}
    right |= dict.fromkeys(("min", "max", "mostrecent", "livemin", "livemax", "livemostrecent"), 1)
    pids = {value for _, labels in now for label, value in labels if label == "pid"}
    gauges = all(now.total(f"in_{mode}") == value for mode, value in right.items())
    return gauges and pids == set(map(str, range(SLOTS))) and now.total("build_info") == 1


@pytest.mark.parametrize(
    ("options", "given"),
    [
        ("-kgevent", {}),
        ("-kgevent --preload", {VARIABLE: "metrics"}),
        ("-kgthread --threads=4", {VARIABLE: "[1]"}),  # to glob, this is 1
        pytest.param("-ksync --preload --user=nobody", {}, marks=as_root),
    ],
)
def test_counts_are_exact_while_workers_and_masters_change(
    options: str, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if "--user" in options:  # who may not read a Python in root's home
        monkeypatch.setenv("PYTHONPATH", str(Path(requests.__file__).parent.parent))
        command = ("sh", "-c", 'umask 77; exec "$0" "$@"', python_for("nobody"), GUNICORN[1])
        monkeypatch.setattr("testbed.service.GUNICORN", command)
    options += f" --workers={WORKERS} --max-requests=250"
    with Foreign(*options.split(), **given) as service:
        assert service.metrics().get_value("hits_total") == 0
        report = soak(service, "", replacements=4)  # a reload first
        assert report["files_before"] <= 13 * SLOTS + 3  # the master has three
        for number, workers in ((signal.SIGTTIN, WORKERS + 1), (signal.SIGTTOU, WORKERS)):
            service.process.send_signal(number)
            service.first_scrape(lambda now: gauges_are_right(now, workers))
        old = service.metrics_folder()
        wait_until(lambda: len(list(old.glob("*.db"))) == report["files_before"])
        with Hits(service, clients=2) as load:
            service.process.send_signal(signal.SIGUSR2)
            (master,) = wait_until(lambda: service.masters()[1:])
            wait_until(lambda: service.answers[master])
            assert service.stop(signal.SIGQUIT if "--preload" in options else signal.SIGTERM) == 0
            with Scraper(service):
                psutil.Process(master).children()[0].kill()
                restarts = service.log().count("Autorestarting")  # by --max-requests
                wait_until(lambda: service.log().count("Autorestarting") > restarts)
        wait_for_workers(service)
        assert load.unanswered.total() <= 2 * (WORKERS + 1)  # per client and ended worker
        service.check(load.unanswered.total())
        assert psutil.Process(master).environ().get(VARIABLE) == given.get(VARIABLE)
        new = service.metrics_folder()
        assert new.parent == old.parent and not old.exists()
        os.kill(master, signal.SIGINT)
        wait_until(lambda: not new.exists())


def test_start_removes_what_killed_masters_left_and_nothing_else(tmp_path: Path) -> None:
    for name in ("prometheus-slots", "my-prometheus-slots-1", "prometheus-slots-", "slots"):
        (tmp_path / name).mkdir()
        (tmp_path / name / ("new" if name.endswith("-") else "lock")).touch()
    (tmp_path / "prometheus-slots-file").touch()
    (tmp_path / "prometheus-slots-link").symlink_to("slots")
    if os.geteuid() == 0:  # another user's, with a lock that one would wait for ever to open
        (tmp_path / "prometheus-slots-1").mkdir()
        os.mkfifo(tmp_path / "prometheus-slots-1/lock")
        os.chown(tmp_path / "prometheus-slots-1", pwd.getpwnam("nobody").pw_uid, -1)
    others = set(tmp_path.rglob("*"))
    given: dict[str, Any] = {VARIABLE: str(tmp_path)}
    with Foreign(**given) as live:
        with Foreign(**given) as killed:
            for service in (live, live, killed):
                service.hit("/a")
                service.check()
            left = killed.metrics_folder()
            killed.stop(signal.SIGKILL)  # its worker lives on for some seconds
            assert left.exists()
            with Foreign(**given):
                assert not left.exists()
        inside = os.open(live.metrics_folder(), os.O_RDONLY)
        with pytest.raises(BlockingIOError):  # so systemd-tmpfiles spares it
            fcntl.flock(inside, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(inside)
        check = [*GUNICORN, "--check-config", "app:app"]
        subprocess.run(check, cwd=live.project, env=given, check=True, timeout=30)
        assert {*tmp_path.iterdir()} - others == {live.metrics_folder()}
        live.hit("/b")
        live.check()
    assert set(tmp_path.rglob("*")) == others


def test_full_folder_ends_the_service_with_one_error(tmp_path: Path) -> None:
    mount = ["mount", "-t", "tmpfs", "tmpfs", str(tmp_path), "-o"]
    size = f"size={(1 + WORKERS) * 13 * 32 + 32}k"  # for the master and WORKERS slots
    if subprocess.run([*mount, size], capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs (root)")
    given: dict[str, Any] = {VARIABLE: str(tmp_path)}
    try:
        with Foreign(f"--workers={WORKERS}", **given) as service:
            wait_for_workers(service)
            service.hit("/a")
            service.check()
            service.process.send_signal(signal.SIGTTIN)
            assert service.wait() == 1
            (reason,) = [line for line in service.log().splitlines() if "No space left" in line]
            assert VARIABLE in reason and not list(tmp_path.iterdir())
            subprocess.run([*mount, "remount,size=256k"], check=True)
            refused = refused_start("--no-control-socket", folder=service.project, **given)
            assert refused.stderr == f"{VARIABLE}: [Errno 28] No space left on device\n"
            assert not list(tmp_path.iterdir())
    finally:
        subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)
