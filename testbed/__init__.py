"""Servers, load and faults for tests, drills and benchmarks."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
ROOT = Path(__file__).resolve().parent.parent


def wait_until(condition: Callable[[], T | None], timeout: float = 30, pause: float = 0.02) -> T:
    """Return the first true result of `condition`; raise AssertionError after `timeout` seconds."""
    give_up = time.monotonic() + timeout
    while not (result := condition()):
        assert time.monotonic() < give_up, f"not true within {timeout} s: {condition}"
        time.sleep(pause)
    return result
