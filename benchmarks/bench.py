"""`make bench`: this service and its peers, on one machine and one PostgreSQL server.

Each round runs all contenders in turn, each on a new database, so that other load on the machine
affects all of them. Ratios are taken within a round. Each 201 must have a row. At its end, a round
runs all of them at once: the machine's speed, which varies, is then the same for all.
"""

import contextlib
import json
import os
import platform
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from statistics import median

import psutil
import requests

from signup.config import Config
from signup.database import prepare_table
from testbed import ROOT, wait_until
from testbed.database import Postgres, count_users, execute
from testbed.programs import free_port, listens, missing
from testbed.service import GUNICORN

ROUNDS = int(os.environ.get("ROUNDS", "5"))
SECONDS = int(os.environ.get("SECONDS", "10"))  # per measurement
CLIENTS = 32
PEERS = ROOT / "benchmarks/peers"
PEERS_PYTHON = ROOT / ".venv-peers/bin/python"
GUIDE = ROOT / ".venv-peers/bin/guide"  # only if Go is installed
OURS = "this service"


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
        return self.created / self.seconds


def wrk(url: str, clients: int, seconds: int) -> Run:
    """Sign up at `url` over `clients` keep-alive connections, each as fast as it can."""
    if reason := missing("wrk"):
        sys.exit(reason)
    script = ROOT / "benchmarks/signups.lua"
    options = ["-t1", f"-c{clients}", f"-d{seconds}s", "--timeout=30s", f"--script={script}"]
    command = ["wrk", *options, url, "--", f"wrk{time.monotonic_ns()}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return Run(**json.loads(done.stdout.splitlines()[-1]))


def spread(values: Sequence[float]) -> str:
    """Return the median with the minimum and maximum."""
    spec = ".0f" if median(values) >= 100 else ".2f"
    middle, low, high = (format(figure(values), spec) for figure in (median, min, max))
    return f"{middle} ({low} to {high})"


@dataclass(frozen=True)
class Contender:
    """How to start a service; {port} and {folder}, an empty folder, are filled in."""

    name: str
    command: tuple[str, ...]
    cwd: Path = PEERS
    env: tuple[tuple[str, str], ...] = ()


OWN = (*GUNICORN, "--bind=127.0.0.1:{port}")
GTHREAD = (str(PEERS_PYTHON), "-m", "gunicorn", "--bind=127.0.0.1:{port}")
CONTENDERS = (
    Contender(OURS, (*OWN, "app:app"), ROOT),
    Contender("this service without metrics", (*OWN, "benchmarks.peers.without_metrics:app"), ROOT),
    Contender(
        "Flask, flask-exporter",
        (*GTHREAD, "--config=flask_exporter.conf.py", "flask_exporter:app"),
        env=(("PROMETHEUS_MULTIPROC_DIR", "{folder}"),),
    ),
    Contender(
        "FastAPI, asyncpg",
        (
            *(str(PEERS_PYTHON), "-m", "uvicorn", "--host=127.0.0.1", "--port={port}"),
            *("--workers=2", "--no-access-log", "--loop=uvloop", "--http=httptools"),
            "fastapi_app:app",
        ),
        env=(("PROMETHEUS_MULTIPROC_DIR", "{folder}"),),
    ),
    *([Contender("Go, lib/pq", (str(GUIDE), "{port}"))] if GUIDE.exists() else []),
)


def cpu(pid: int) -> float:
    """Return the CPU seconds of `pid` and its children, including reaped ones."""
    process = psutil.Process(pid)
    seconds: float = sum(process.cpu_times()[:4])
    for child in process.children():
        with contextlib.suppress(psutil.NoSuchProcess):  # it has exited
            seconds += sum(child.cpu_times()[:2])
    return seconds


def private_memory(pid: int) -> list[float]:
    """Return the megabytes that each worker of `pid` shares with no other process, largest first.

    Without children, `pid` is the worker.
    """
    main = psutil.Process(pid)
    return sorted(p.memory_full_info().uss / 2**20 for p in main.children() or [main])[::-1]


@contextlib.contextmanager
def running(contender: Contender, url: str) -> Iterator[tuple[str, int]]:
    """Run `contender`; yield its URL and the pid of its main process."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="signup-bench-") as folder:

        def fill(text: str) -> str:
            return text.format(port=port, folder=folder)

        process = subprocess.Popen(
            [fill(part) for part in contender.command],
            cwd=contender.cwd,
            env=os.environ
            | {"DATABASE_URL": url, "WEB_CONCURRENCY": "2"}
            | {name: fill(value) for name, value in contender.env},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            wait_until(lambda: listens(port))
            address = f"http://127.0.0.1:{port}"
            assert requests.get(f"{address}/signup", timeout=30).status_code == 405
            yield address, process.pid
        finally:
            process.terminate()
            process.wait(timeout=40)


def new_table(postgres: Postgres) -> str:
    url = postgres.new_database()
    prepare_table(Config.from_env({"DATABASE_URL": url}))
    return url


def measured(
    address: str, url: str, pids: Sequence[int], clients: int, seconds: int
) -> tuple[Run, int, list[float]]:
    """Run wrk; return its counts, the new rows, and the CPU seconds per signup of each pid."""
    rows, before = settled_rows(url), [cpu(pid) for pid in pids]
    run = wrk(address, clients, seconds)
    signups = settled_rows(url) - rows
    assert run.refused == run.unanswered == 0, run
    # Requests in flight when wrk stops are stored, but wrk does not count them.
    assert run.created <= signups <= run.created + clients, (run, signups)
    used = [cpu(pid) - start for pid, start in zip(pids, before, strict=True)]
    return run, signups, [seconds / signups for seconds in used]


def measure(contender: Contender, postgres: Postgres) -> dict[str, float]:
    """Return the figures of a round: the CPU is of a signup, in all processes of a service."""
    url = new_table(postgres)
    with running(contender, url) as (address, pid):
        wrk(address, CLIENTS, 2)
        run, _, (used,) = measured(address, url, [pid], CLIENTS, SECONDS)
        workers = private_memory(pid)[:2]
    latencies = {"p50 ms": run.p50 * 1000, "p99 ms": run.p99 * 1000}
    memory = sum(workers) / len(workers)
    return {"signups/s": run.rate, **latencies, "CPU ms": used * 1000, "MB per worker": memory}


def measure_at_once(postgres: Postgres) -> list[float]:
    """Return the CPU seconds per signup of each contender; they share the clients."""
    clients = CLIENTS // len(CONTENDERS)
    with contextlib.ExitStack() as stack, ThreadPoolExecutor() as executor:
        started = []
        for contender in CONTENDERS:
            url = new_table(postgres)
            started.append((url, *stack.enter_context(running(contender, url))))
        wait([executor.submit(wrk, address, clients, 2) for _, address, _ in started])
        runs = [
            executor.submit(measured, address, url, [pid], clients, SECONDS)
            for url, address, pid in started
        ]
        return [run.result()[2][0] for run in runs]


def settled_rows(url: str) -> int:
    """Return the number of rows once it has stopped growing."""
    rows = -1

    def settled() -> bool:
        nonlocal rows
        before, rows = rows, count_users(url)
        return before == rows

    wait_until(settled)
    return rows


def pgbench(postgres: Postgres) -> float:
    """Return how many of the same INSERTs pgbench makes per second with 25 clients."""
    script = postgres.server.home / "pgbench.sql"
    script.write_text(
        "\\set a random(1, 1000000000)\n\\set b random(1, 1000000000)\n"
        "INSERT INTO users (email, email_folded, first_name, last_name)"
        " VALUES (:a || '-' || :b || '@example.com', :a || '-' || :b || '@example.com',"
        " 'John', 'Doe') ON CONFLICT DO NOTHING RETURNING id;\n"
    )
    options = ("--no-vacuum", "--client=25", "--jobs=2", f"--time={SECONDS}", f"--file={script}")
    output = postgres.server.run("pgbench", *options, new_table(postgres))
    (rate,) = re.findall(r"^tps = ([\d.]+)", output, re.M)
    return float(rate)


def machine() -> str:
    """Describe what is measured: processor, kernel, versions, commit.

    The interpreter's build decides more than most levers do.
    """
    model = re.search(r"^model name\s*: (.+)", Path("/proc/cpuinfo").read_text(), re.M)
    packages = ("gunicorn", "gevent", "flask", "psycopg2-binary", "prometheus-client")
    git = ("git", "-C", str(ROOT), "describe", "--always", "--dirty")
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    configured = sysconfig.get_config_var("CONFIG_ARGS") or ""
    build = "BUILT WITHOUT OPTIMISATION (--enable-optimizations): take no figures from this"
    if sys.base_prefix == "/usr" or "--enable-optimizations" in configured:
        build = f"{platform.python_compiler()}, a distributor's or profile-guided build"
    return f"""\
{len(os.sched_getaffinity(0))} cores of {model[1] if model else "?"}, {platform.platform()}
Python {platform.python_version()}, {build}
{", ".join(f"{name} {metadata.version(name)}" for name in packages)}
commit {commit or "unknown"}"""


def report(rounds: dict[str, list[dict[str, float]]]) -> None:
    """Print medians with minimum and maximum, and the ratio of the first contender to each."""
    first, *_ = rounds.values()
    for name, each in rounds.items():
        print(name)
        for figure in each[0]:
            text = spread([one[figure] for one in each])
            ratio = median(a[figure] / b[figure] for a, b in zip(first, each, strict=True))
            print(f"  {figure:16} {text:26} x {ratio:.2f}")


def main() -> None:
    results: dict[str, list[dict[str, float]]] = {each.name: [] for each in CONTENDERS}
    ceiling: list[float] = []
    with Postgres(fsync=True) as postgres:
        for number in range(ROUNDS):
            print(f"round {number + 1} of {ROUNDS}", file=sys.stderr)
            for contender in CONTENDERS:
                execute(postgres.url, "CHECKPOINT")
                results[contender.name].append(measure(contender, postgres))
            for rounds, seconds in zip(results.values(), measure_at_once(postgres), strict=True):
                rounds[-1]["CPU ms at once"] = seconds * 1000
            ceiling.append(pgbench(postgres))
    print(f"{machine()}\n{CLIENTS} clients, {ROUNDS} rounds of {SECONDS} s")
    report(results)
    print(f"the same INSERT with pgbench, 25 clients: {spread(ceiling)} signups/s")


if __name__ == "__main__":
    main()
