"""Servers, load and faults for tests, drills and benchmarks."""

import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
ROOT = Path(__file__).resolve().parent.parent
SETTINGS = re.compile(
    "PORT|DATABASE_.*|WEB_.*|METRICS_.*|MAX_BODY_BYTES|LOG_LEVEL|PROMETHEUS_.*|GUNICORN_.*|PG.*"
)
# What the shell sets for other services. `python -m testbed.postgres`, as in `make run`, needs it.
if sys.argv[0] != "-m":
    for name in filter(SETTINGS.fullmatch, list(os.environ)):
        del os.environ[name]
    direct = os.environ.get("no_proxy") or os.environ.get("NO_PROXY", "")
    os.environ["no_proxy"] = f"127.0.0.1,localhost,{direct}"


def wait_until(condition: Callable[[], T | None], timeout: float = 30, pause: float = 0.02) -> T:
    """Return the first true result of `condition`; raise AssertionError after `timeout` seconds."""
    give_up = time.monotonic() + timeout
    while not (result := condition()):
        assert time.monotonic() < give_up, f"not true within {timeout} s: {condition}"
        time.sleep(pause)
    return result
