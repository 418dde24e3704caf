"""Invalid settings stop the start with one line each; valid settings are used as given."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from signup.config import Config, ConfigError
from testbed import ROOT
from testbed.database import Postgres, broken_table
from testbed.service import USER, Service, refused_start

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


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, wrong in WRONG.items() for v in wrong])
def test_invalid_value_is_reported_with_the_allowed_values(name: str, value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Config.from_env({name: value})
    message = str(caught.value)
    assert message.startswith(f"{name}: {value!r} is not allowed: ")
    assert "\n" not in message


@pytest.mark.parametrize(
    "url",
    [
        "localhost",
        "mysql://user:s3cret@localhost/db",
        "postgresql://user:s3cret@[bad/db",
        "postgresql://user:s3cret@host:5432/db?nonsense=1",
        "postgresql://host/db?password=s3cret&nonsense=1",
        "host=localhost password=s3cret",
    ],
)
def test_invalid_url_is_not_shown(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Config.from_env({"DATABASE_URL": url})
    assert str(caught.value) == (
        "DATABASE_URL is not allowed: "
        "it must look like postgresql://user:password@host:port/database"
    )


@pytest.mark.parametrize(
    ("query", "env"),
    [
        ("?options=-csearch_path%3Dother", {}),
        ("?service=other", {}),
        ("", {"PGOPTIONS": "-csearch_path=other"}),
        ("", {"PGSERVICE": "other"}),
    ],
)
def test_settings_that_a_pooler_would_drop_are_refused(query: str, env: dict[str, Any]) -> None:
    done = refused_start(DATABASE_URL=f"postgresql://me@db.example/signup{query}", **env)
    assert refusal(done).startswith("DATABASE_URL is not allowed: instead of options")


@pytest.mark.parametrize("unescaped", ["@", "/", "#", "%", "%zz", "@/", "/@", "#@", "%/%"])
@pytest.mark.parametrize("place", ["user:s3{}cret", "user:{}s3cret", "user:s3cret{}", "s3{}cret:p"])
def test_url_without_percent_encoding_is_not_shown(unescaped: str, place: str) -> None:
    url = f"postgresql://{place.format(unescaped)}@localhost:5432/signup"
    with pytest.raises(ConfigError) as caught:
        Config.from_env({"DATABASE_URL": url})
    (line,) = str(caught.value).splitlines()
    assert line.startswith("DATABASE_URL is not allowed: percent-encode ")
    for part in ("cret", "s3", "localhost", "5432"):
        assert part not in line


def test_given_values_replace_defaults() -> None:
    config = Config.from_env({"PORT": ""})  # an empty variable counts as unset
    assert (config.port, config.database_url) == (3000, "")
    assert (config.database_max_connections, config.max_body_bytes) == (25, 16384)
    assert config.web_concurrency == 0  # one worker per core
    given = Config.from_env(
        {
            "PORT": "8080",
            "DATABASE_URL": "postgresql://user:p%40ss@db/signup",
            "DATABASE_POOL_TIMEOUT": "0.5",
            "WEB_CONCURRENCY": "3",
            "LOG_LEVEL": "WARNING",
        }
    )
    assert (given.port, given.database_pool_timeout, given.web_concurrency) == (8080, 0.5, 3)
    assert given.database_url == "postgresql://user:p%40ss@db/signup"
    assert given.log_level.lower() == "warning"


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


def test_default_worker_count_is_at_most_the_connection_limit(url: str) -> None:
    with Service(DATABASE_URL=url, DATABASE_MAX_CONNECTIONS="1") as service:
        service.wait_for(database_connections_max=1)
        assert service.metrics().get_value("signup_workers") == 1


def test_unusable_metrics_folder_is_refused(postgres: Postgres) -> None:
    done = refused_start(DATABASE_URL=postgres.url, PROMETHEUS_MULTIPROC_DIR="/dev/null/metrics")
    line = refusal(done)
    assert line.startswith("PROMETHEUS_MULTIPROC_DIR: ")
    assert "Not a directory" in line
    assert "'/dev/null/metrics'" in line


# Percent-encoded, or accepted by libpq without percent-encoding.
PASSWORDS = [f"s3{part}cret" for part in ("", "%40", ":", "'", '"', "\\", "?", " ")]
WITH_PASSWORD = ["postgresql://postgres:{}@/signup", "postgresql://postgres@/signup?password={}"]


@pytest.mark.parametrize("password", PASSWORDS)
@pytest.mark.parametrize("url", WITH_PASSWORD)
def test_config_error_contains_no_password(url: str, password: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Config.from_env({"DATABASE_URL": url.format(password)}, workers=26)
    assert "cret" not in str(caught.value)


@pytest.mark.parametrize("url", WITH_PASSWORD)
def test_more_workers_than_connections_are_refused_and_no_password_shown(url: str) -> None:
    url = url.format("s3:cret")
    for options, named in (([], url), ([f"--env=DATABASE_URL={url}"], "")):
        done = refused_start("--workers=26", *options, LOG_LEVEL="debug", DATABASE_URL=named)
        start = "DATABASE_MAX_CONNECTIONS: '25' is not allowed: each of 26 workers "
        assert refusal(done).startswith(start)
        assert "cret" not in done.stdout + done.stderr


@pytest.mark.parametrize("how", ["user", "parameter"])
def test_log_contains_no_password(postgres: Postgres, how: str) -> None:
    """At level debug, gunicorn also logs its settings."""
    url = postgres.new_database()
    url = url.replace(":right@", ":s3%40cret@")  # this server accepts any password
    if how == "parameter":
        url = url.replace(":s3%40cret@", "@") + "&password=s3cret"
    with Service(f"--env=DATABASE_URL={url}", DATABASE_URL=url, LOG_LEVEL="debug") as service:
        assert service.get("/readyz").status_code == 200
        with broken_table(url):
            assert service.signup(json=USER).status_code == 500
        assert service.stop() == 0
        assert "UndefinedColumn" in service.log()
        assert "cret" not in service.log()
