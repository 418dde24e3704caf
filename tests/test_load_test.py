"""A short `make load-test-smoke`: when it passes, and when it fails."""

import subprocess
from pathlib import Path

from testbed import ROOT
from testbed.database import broken_table, count_users
from testbed.load import Signups
from testbed.service import Service

ENOUGH = 3  # seconds


def smoke(url: str, folder: Path) -> tuple[bool, list[str]]:
    """Run the load test; return whether it passed, and its verdicts."""
    options = [f"HOST={url}", f"SECONDS={ENOUGH}", f"REPORT={folder / 'report.html'}"]
    command = ["make", "load-test-smoke", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    verdicts = [x for x in done.stdout.splitlines() if x.startswith(("ok ", "FAILED ", "the ser"))]
    return done.returncode == 0, verdicts


def test_load_test_passes_and_agrees_with_the_server(url: str, tmp_path: Path) -> None:
    with Service(DATABASE_URL=url) as service:
        passed, verdicts = smoke(service.url, tmp_path)
        words = [verdict.split()[0] for verdict in verdicts]
        assert words[1:] == ["ok"] * 2
        assert passed == (words[0] == "ok")  # the first is about latency, which no test asserts
        rows = count_users(url)
        assert f"the server counted {rows} x 201" in verdicts[2]
        assert verdicts[2].endswith("Locust differs by 0")
    assert "<html" in (tmp_path / "report.html").read_text()


def test_load_test_fails_when_requests_fail_and_the_server_counts_others(
    url: str, tmp_path: Path
) -> None:
    with Service(DATABASE_URL=url) as service, broken_table(url), Signups(service, 1):
        passed, verdicts = smoke(service.url, tmp_path)
        assert not passed
        assert "requests failed" in verdicts[1] and verdicts[1].startswith("FAILED")
        assert verdicts[2].startswith("FAILED the server counted")


def test_load_test_reports_an_unreachable_service() -> None:
    command = ["make", "load-test-smoke", "HOST=http://127.0.0.1:1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "no response from http://127.0.0.1:1" in done.stderr
