"""Load from wrk: each connection sends a signup as soon as the last one has its response."""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from testbed.programs import missing

SCRIPT = Path(__file__).with_name("signups.lua")


@dataclass(frozen=True)
class Run:
    """The counts of wrk; times in seconds."""

    created: int  # 201 responses
    refused: int  # other responses
    unanswered: int
    seconds: float
    p50: float
    p99: float

    @property
    def rate(self) -> float:
        """Signups per second."""
        return self.created / self.seconds


def wrk(url: str, clients: int, seconds: int) -> Run:
    """Sign up at `url` over `clients` keep-alive connections for `seconds`."""
    if reason := missing("wrk"):
        sys.exit(reason)
    options = ["-t1", f"-c{clients}", f"-d{seconds}s", "--timeout=30s", f"--script={SCRIPT}"]
    command = ["wrk", *options, url, "--", f"wrk{time.monotonic_ns()}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return Run(**json.loads(done.stdout.splitlines()[-1]))


def spread(values: Sequence[float], spec: str) -> str:
    """Return the median with the minimum and maximum."""
    middle, low, high = (format(figure(values), spec) for figure in (median, min, max))
    return f"{middle} ({low} to {high})"
