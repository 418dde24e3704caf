"""Wrong settings stop the start with a line each; right ones are taken as they are."""

import subprocess
from pathlib import Path

import pytest

from signup import create_app
from signup.config import Config, ConfigError

from .service import GUNICORN, ROOT, Postgres

WRONG = [
    ("PORT", "abc"),
    ("PORT", "0"),
    ("PORT", "65536"),
    ("DATABASE_URL", "mysql://localhost/db"),
    ("DATABASE_URL", "localhost"),
    ("DATABASE_URL", "postgresql://[bad/db"),
    ("DATABASE_MAX_CONNECTIONS", "0"),
    ("DATABASE_MAX_CONNECTIONS", "2.5"),
    ("DATABASE_POOL_TIMEOUT", "-1"),
    ("DATABASE_POOL_TIMEOUT", "nan"),
    ("DATABASE_STATEMENT_TIMEOUT", "inf"),
    ("DATABASE_STATEMENT_TIMEOUT", "soon"),
    ("METRICS_SAMPLE_INTERVAL", "0"),
    ("MAX_BODY_BYTES", "16k"),
    ("WEB_CONCURRENCY", "0"),
    ("WEB_CONCURRENCY", "26"),
    ("WEB_THREADS", "-4"),
    ("LOG_LEVEL", "loud"),
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_wrong_value_is_named_with_what_is_allowed(name: str, value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Config.from_env({name: value})
    message = str(caught.value)
    assert message.startswith(f"{name}: {value!r} is not allowed: ")
    assert "\n" not in message


def test_every_mistake_has_a_line() -> None:
    with pytest.raises(ConfigError) as caught:
        Config.from_env({"PORT": "x", "LOG_LEVEL": "y", "MAX_BODY_BYTES": "z"})
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines] == ["PORT", "MAX_BODY_BYTES", "LOG_LEVEL"]


@pytest.mark.parametrize(
    "url",
    [
        "mysql://user:s3cret@localhost/db",
        "postgresql://user:s3cret@[bad/db",
        "postgresql://user:s3@cret:s3cret@host:5432/db?nonsense=1",
        "postgresql://host/db?password=s3cret&nonsense=1",
        "host=localhost password=s3cret",
    ],
)
def test_no_password_is_shown(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Config.from_env({"DATABASE_URL": url})
    assert "DATABASE_URL" in str(caught.value)
    assert "cret" not in str(caught.value)


def test_defaults_and_given_values() -> None:
    config = Config.from_env({"PORT": ""})  # an empty variable is as one that is unset
    assert (config.port, config.database_url, config.metrics_dir) == (3000, None, None)
    assert (config.database_max_connections, config.max_body_bytes) == (25, 16384)
    assert config.workers >= 2
    given = Config.from_env(
        {
            "PORT": "8080",
            "DATABASE_URL": "postgresql://user:p%40ss@db/signup",
            "DATABASE_POOL_TIMEOUT": "0.5",
            "WEB_CONCURRENCY": "3",
            "LOG_LEVEL": "WARNING",
        }
    )
    assert (given.port, given.database_pool_timeout, given.workers) == (8080, 0.5, 3)
    assert given.database_url == "postgresql://user:p%40ss@db/signup"
    assert given.log_level == "warning"


def test_an_app_without_a_database_says_so() -> None:
    with pytest.raises(ConfigError, match="DATABASE_URL is not set"):
        create_app(Config.from_env({}))


def start(*options: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Start gunicorn, which is expected to refuse."""
    command = [*GUNICORN, "--bind=127.0.0.1:0", *options, "app:app"]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)


def test_gunicorn_refuses_with_the_line_alone() -> None:
    done = start(PORT="http", DATABASE_URL="postgres://me:s3cret@[bad/db")
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert [line.split(":")[0] for line in lines] == ["PORT", "DATABASE_URL"]
    assert "s3cret" not in done.stderr


def test_more_workers_than_connections_on_the_command_line(postgres: Postgres) -> None:
    done = start("--workers=26", DATABASE_URL=postgres.url)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("WEB_CONCURRENCY: '26' is not allowed")


def test_another_kind_of_worker_is_refused(postgres: Postgres) -> None:
    done = start("--worker-class=gthread", DATABASE_URL=postgres.url)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("worker_class: ")


def test_tls_is_left_to_the_proxy(postgres: Postgres, tmp_path: Path) -> None:
    for name in ("cert", "key"):
        (tmp_path / name).touch()
    options = (f"--certfile={tmp_path / 'cert'}", f"--keyfile={tmp_path / 'key'}")
    done = start(*options, DATABASE_URL=postgres.url)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("TLS belongs to the proxy")


def test_a_metrics_folder_that_cant_be_written(postgres: Postgres) -> None:
    done = start(DATABASE_URL=postgres.url, PROMETHEUS_MULTIPROC_DIR="/dev/null/metrics")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "PROMETHEUS_MULTIPROC_DIR: '/dev/null/metrics' can't be written: Not a directory"
    )
