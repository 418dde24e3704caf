"""Invalid settings stop the start with one line each; valid settings are used as given."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from signup.config import Config, ConfigError
from testbed import ROOT
from testbed.database import Postgres, broken_table
from testbed.service import USER, Service, refused_start

CPUS = len(os.sched_getaffinity(0))
WRONG = {
    "PORT": ("abc", "0", "65536"),
    "DATABASE_MAX_CONNECTIONS": ("0", "2.5"),
    "DATABASE_POOL_TIMEOUT": ("-1", "nan"),
    "DATABASE_STATEMENT_TIMEOUT": ("inf", "soon"),
    "METRICS_SAMPLE_INTERVAL": ("0",),
    "MAX_BODY_BYTES": ("16k",),
    "WEB_CONCURRENCY": ("0", "two"),
    "LOG_LEVEL": ("loud",),
}
MALFORMED = "it must look like postgresql://user:password@host:port/database"
POOLED = "instead of options, service, PGOPTIONS and PGSERVICE, use ALTER ROLE ... SET and a host"
UNESCAPED = "percent-encode @ / # % quotes and spaces in the user, password and database"
PASSWORDS = [
    place.format(part)
    for place in ("user:s3{}cret", "user:{}s3cret", "user:s3cret{}", "s3{}cret:p")
    for part in ("@", "/", "#", "%", "%zz", "@/", "/@", "#@", "%/%", "'", '"', " ")
]


def mistake(env: dict[str, str], workers: int = 0) -> str:
    with pytest.raises(ConfigError) as caught:
        Config.from_env(env, workers)
    return str(caught.value)


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, wrong in WRONG.items() for v in wrong])
def test_invalid_value_is_reported_with_the_allowed_values(name: str, value: str) -> None:
    message = mistake({name: value})
    assert message.startswith(f"{name}: {value!r} is not allowed: ")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("url", "cause"),
    [
        ("localhost", MALFORMED),
        ("mysql://user:s3cret@localhost/db", MALFORMED),
        ("postgresql://user:s3cret@[bad/db", MALFORMED),
        ("postgresql://user:s3cret@host:5432/db?nonsense=1", MALFORMED),
        ("postgresql://host/db?password=s3cret&nonsense=1", MALFORMED),
        ("host=localhost password=s3cret", MALFORMED),
        ("postgresql://me@db.example/signup?options=-csearch_path%3Dother", POOLED),
        ("postgresql://me@db.example/signup?service=other", POOLED),
        *((f"postgresql://{p}@localhost:5432/signup", UNESCAPED) for p in PASSWORDS),
        *((f"postgresql://me@/signup?password=s3{part}cret", UNESCAPED) for part in "'\" #"),
    ],
)
def test_unusable_url_is_not_shown(url: str, cause: str) -> None:
    assert mistake({"DATABASE_URL": url}) == f"DATABASE_URL is not allowed: {cause}"


@pytest.mark.parametrize("name", ["PGOPTIONS", "PGSERVICE"])
def test_variable_that_a_pooler_would_drop_is_refused(name: str) -> None:
    env = {"DATABASE_URL": "postgresql://me@db.example/signup", name: "-csearch_path=other"}
    assert mistake(env) == f"DATABASE_URL is not allowed: {POOLED}"


def test_given_values_replace_defaults() -> None:
    defaults = Config(3000, "", 25, 5.0, 5.0, 1.0, 16384, 0, "info")  # README.md
    assert Config.from_env({"PORT": ""}) == defaults  # an empty variable counts as unset
    given = {"port": 8080, "database_url": "postgresql://user:p%40ss@db/signup"}
    given |= {"database_pool_timeout": 0.5, "web_concurrency": 3, "log_level": "WARNING"}
    env = {name.upper(): str(value) for name, value in given.items()}
    assert Config.from_env(env) == replace(defaults, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("command", ["python app.py", "flask run", "flask --app signup run"])
def test_start_without_gunicorn_says_what_to_run(command: str) -> None:
    program, *arguments = command.split()
    full = [str(Path(sys.executable).with_name(program)), *arguments]
    done = subprocess.run(full, cwd=ROOT, env={}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "start the service with `make run` or `gunicorn app:app`" in line


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    """Return the reason: the only line of standard error outside gunicorn's JSON log."""
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("{")]
    return line


def test_refused_start_prints_one_line_per_invalid_setting() -> None:
    done = refused_start(PORT="x", LOG_LEVEL="y", DATABASE_URL="postgres://me:s3cret@[bad/db")
    lines = done.stderr.splitlines()
    assert [line.split()[0] for line in lines] == ["PORT:", "LOG_LEVEL:", "DATABASE_URL"]
    assert "s3cret" not in done.stderr + done.stdout
    assert refusal(refused_start()).startswith("DATABASE_URL is not set: use postgresql://user:")


@pytest.mark.parametrize(("budget", "workers"), [("1", 1), ("", max(2, CPUS))])
def test_default_worker_count(url: str, budget: str, workers: int) -> None:
    """It is at most the connection limit, and an empty variable counts as unset."""
    with Service(DATABASE_URL=url, DATABASE_MAX_CONNECTIONS=budget) as service:
        service.wait_for(signup_workers=workers, database_connections_max=float(budget or 25))


def test_make_run_passes_on_the_database_and_settings_that_it_was_given() -> None:
    command = [sys.executable, "-m", "testbed.postgres", "env"]
    env = {"DATABASE_URL": "postgresql://me:s3cret@db.example:5432/orders", "WEB_CONCURRENCY": ""}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert done.stderr == "DATABASE_URL is set: using database orders on db.example\n"
    assert f"DATABASE_URL={env['DATABASE_URL']}\n" in done.stdout
    assert "WEB_CONCURRENCY" not in done.stdout  # gunicorn refuses an empty one
    env["WEB_CONCURRENCY"] = "two"
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    what = "WEB_CONCURRENCY: 'two' is not allowed: use 1 to 256 (an integer)\n"
    assert (done.returncode, done.stderr) == (1, what)


def test_unusable_metrics_folder_is_refused(postgres: Postgres) -> None:
    done = refused_start(DATABASE_URL=postgres.url, PROMETHEUS_MULTIPROC_DIR="/dev/null/metrics")
    line = refusal(done)
    assert line.startswith("PROMETHEUS_MULTIPROC_DIR: ")
    assert "Not a directory" in line
    assert "'/dev/null/metrics'" in line


@pytest.mark.parametrize("by_option", [False, True])
def test_more_workers_than_connections_are_refused_and_no_password_shown(by_option: bool) -> None:
    url = "postgresql://me:s3%40cret@/signup?password=s3:cret"
    options, url = ([f"--env=DATABASE_URL={url}"], "") if by_option else ([], url)
    done = refused_start("--workers=26", *options, LOG_LEVEL="debug", DATABASE_URL=url)
    start = "DATABASE_MAX_CONNECTIONS: '25' is not allowed: each of 26 workers "
    assert refusal(done).startswith(start)
    assert "cret" not in done.stdout + done.stderr


def test_log_contains_no_password(url: str) -> None:
    """At level debug, gunicorn also logs its settings."""
    url = url.replace(":right@", ":s3%40cret@") + "&password=s3cret"  # this server accepts any
    with Service(f"--env=DATABASE_URL={url}", DATABASE_URL=url, LOG_LEVEL="debug") as service:
        assert service.get("/readyz").status_code == 200
        with broken_table(url):
            assert service.signup(json=USER).status_code == 500
        assert service.stop() == 0
        assert "UndefinedColumn" in service.log()
        assert "cret" not in service.log()
