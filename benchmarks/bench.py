"""`make bench`: this service and its peers, on one machine and one PostgreSQL server.

Each round runs all contenders in turn, each on a new database, so that other load on the machine
affects all of them. Ratios are taken within a round. Each 201 must have a row. At its end, a round
runs all of them at once: the machine's speed, which varies, is then the same for all.
"""

import contextlib
import os
import platform
import re
import subprocess
import sys
import sysconfig
import tempfile
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
from testbed.programs import free_port
from testbed.service import GUNICORN

from .wrk import Run, spread, wrk

ROUNDS = int(os.environ.get("ROUNDS", "5"))
SECONDS = int(os.environ.get("SECONDS", "10"))  # per measurement
CLIENTS = 32
PEERS = ROOT / "benchmarks/peers"
PEERS_PYTHON = ROOT / ".venv-peers/bin/python"
GUIDE = ROOT / ".venv-peers/bin/guide"  # only if Go is installed
MEGABYTE = 2**20
OURS = "this service"


@dataclass(frozen=True)
class Contender:
    """How to start a service; {port} and {folder}, an empty folder, are filled in."""

    name: str
    command: tuple[str, ...]
    cwd: Path = PEERS
    env: tuple[tuple[str, str], ...] = ()


# The figures of a round, and how they are printed. The CPU is that of a signup, in all processes
# of a service: alone, and while all contenders run. The memory is private.
FIGURES = {
    "signups/s": ".0f",
    "p50 ms": ".1f",
    "p99 ms": ".1f",
    "CPU ms": ".2f",
    "  all at once": ".2f",
    "MB per worker": ".0f",
}


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


def children(pid: int) -> list[int]:
    """Return the live children of `pid`."""
    return [child.pid for child in psutil.Process(pid).children()]


def cpu(pid: int) -> float:
    """Return the CPU seconds of `pid` and its children, including reaped ones."""
    process = psutil.Process(pid)
    seconds: float = sum(process.cpu_times()[:4])
    for child in process.children():
        with contextlib.suppress(psutil.NoSuchProcess):  # it has exited
            seconds += sum(child.cpu_times()[:2])
    return seconds


def private_memory(pid: int) -> float:
    """Return the bytes of memory that `pid` shares with no other process."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(int(kb) for kb in re.findall(r"^Private_\w+: +(\d+) kB", text, re.M)) * 1024


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
            address = f"http://127.0.0.1:{port}"
            wait_until(lambda: is_serving(address))
            yield address, process.pid
        finally:
            process.terminate()
            process.wait(timeout=40)


def is_serving(address: str) -> bool:
    with contextlib.suppress(requests.ConnectionError):
        return requests.get(f"{address}/signup", timeout=10).status_code == 405
    return False


def new_table(postgres: Postgres) -> str:
    """Return the URL of a new database with an empty table `users`."""
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
    url = new_table(postgres)
    with running(contender, url) as (address, pid):
        wrk(address, CLIENTS, 2)
        run, _, (used,) = measured(address, url, [pid], CLIENTS, SECONDS)
        processes = children(pid) or [pid]  # no children: a single process
        workers = sorted((private_memory(p) for p in processes), reverse=True)[:2]
    memory = sum(workers) / len(workers) / MEGABYTE
    latencies = {"p50 ms": run.p50 * 1000, "p99 ms": run.p99 * 1000}
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


def main() -> None:
    results: dict[str, list[dict[str, float]]] = {each.name: [] for each in CONTENDERS}
    ceiling: list[float] = []
    with Postgres() as postgres:
        for number in range(ROUNDS):
            print(f"round {number + 1} of {ROUNDS}", file=sys.stderr)
            for contender in CONTENDERS:
                execute(postgres.url, "CHECKPOINT")
                results[contender.name].append(measure(contender, postgres))
            for rounds, seconds in zip(results.values(), measure_at_once(postgres), strict=True):
                rounds[-1]["  all at once"] = seconds * 1000
            ceiling.append(pgbench(postgres))
    report(results, ceiling)


def machine() -> str:
    """Describe what is measured: processor, kernel, versions, commit."""
    model = re.search(r"^model name\s*: (.+)", Path("/proc/cpuinfo").read_text(), re.M)
    packages = ("gunicorn", "gevent", "flask", "psycopg2-binary", "prometheus-client")
    git = ("git", "-C", str(ROOT), "describe", "--always", "--dirty")
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return "\n".join(
        (
            f"{len(os.sched_getaffinity(0))} cores"
            f" of {model[1] if model else platform.machine()}, {platform.platform()}",
            f"Python {platform.python_version()}, {build()}",
            ", ".join(f"{name} {metadata.version(name)}" for name in packages),
            f"commit {commit or 'unknown'}",
        )
    )


def build() -> str:
    """Describe the interpreter's build, which decides more than most levers do."""
    configured = sysconfig.get_config_var("CONFIG_ARGS") or ""
    if sys.base_prefix == "/usr" or "--enable-optimizations" in configured:
        return f"{platform.python_compiler()}, a distributor's or profile-guided build"
    return "BUILT WITHOUT OPTIMISATION (--enable-optimizations): take no figures from this"


def report(results: dict[str, list[dict[str, float]]], ceiling: list[float]) -> None:
    """Print medians with minimum and maximum, and the ratio of this service to each."""
    print(machine())
    print(f"{CLIENTS} clients, {ROUNDS} rounds of {SECONDS} s")
    for name, rounds in results.items():
        print(name)
        for figure, spec in FIGURES.items():
            text = spread([each[figure] for each in rounds], spec)
            pairs = zip(results[OURS], rounds, strict=True)
            ratio = median(ours[figure] / theirs[figure] for ours, theirs in pairs)
            print(f"  {figure:13} {text:26} x {ratio:.2f}")
    print("the same INSERT with pgbench, 25 clients")
    print(f"  {'signups/s':13} {spread(ceiling, '.0f')}")


if __name__ == "__main__":
    main()
