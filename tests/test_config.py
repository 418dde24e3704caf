"""Wrong settings stop the start with a line each; right ones are taken as they are."""

import subprocess
from pathlib import Path

import pytest

from signup import create_app
from signup.config import Config, ConfigError
from testbed import ROOT, wait_until
from testbed.database import Postgres, execute
from testbed.service import GUNICORN, Service

WRONG = [
    ("PORT", "abc"),
    ("PORT", "0"),
    ("PORT", "65536"),
    ("DATABASE_MAX_CONNECTIONS", "0"),
    ("DATABASE_MAX_CONNECTIONS", "2.5"),
    ("DATABASE_POOL_TIMEOUT", "-1"),
    ("DATABASE_POOL_TIMEOUT", "nan"),
    ("DATABASE_STATEMENT_TIMEOUT", "inf"),
    ("DATABASE_STATEMENT_TIMEOUT", "soon"),
    ("METRICS_SAMPLE_INTERVAL", "0"),
    ("MAX_BODY_BYTES", "16k"),
    ("WEB_CONCURRENCY", "0"),
    ("WEB_CONCURRENCY", "two"),
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
        "localhost",
        "mysql://user:s3cret@localhost/db",
        "postgresql://user:s3cret@[bad/db",
        "postgresql://user:s3cret@host:5432/db?nonsense=1",
        "postgresql://host/db?password=s3cret&nonsense=1",
        "host=localhost password=s3cret",
    ],
)
def test_a_wrong_url_is_not_shown(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Config.from_env({"DATABASE_URL": url})
    assert str(caught.value) == (
        "DATABASE_URL is not allowed: "
        "it must look like postgresql://user:password@host:port/database"
    )


@pytest.mark.parametrize("unescaped", ["@", "/", "#", "%", "%zz", "@/", "/@", "#@", "%/%"])
@pytest.mark.parametrize("place", ["user:s3{}cret", "user:{}s3cret", "user:s3cret{}", "s3{}cret:p"])
def test_a_url_that_is_not_percent_encoded_is_not_shown(unescaped: str, place: str) -> None:
    url = f"postgresql://{place.format(unescaped)}@localhost:5432/signup"
    with pytest.raises(ConfigError) as caught:
        Config.from_env({"DATABASE_URL": url})
    (line,) = str(caught.value).splitlines()
    assert line.startswith("DATABASE_URL is not allowed: percent-encode ")
    for part in ("cret", "s3", "localhost", "5432"):
        assert part not in line


def test_defaults_and_given_values() -> None:
    config = Config.from_env({"PORT": ""})  # an empty variable is as one that is unset
    assert (config.port, config.database_url, config.prometheus_multiproc_dir) == (3000, "", "")
    assert (config.database_max_connections, config.max_body_bytes) == (25, 16384)
    assert config.web_concurrency == 0  # one for each core
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


def test_an_app_without_a_database_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DATABASE_URL", raising=False)
    with pytest.raises(ConfigError, match="DATABASE_URL is not set"):
        create_app()


def start(*options: str, folder: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    """Start gunicorn in `folder`, which is expected to refuse."""
    command = [*GUNICORN, "--bind=127.0.0.1:0", *options, "app:app"]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=60)


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    """The one line, beside those of gunicorn's log, that says why."""
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("{")]
    return line


def test_gunicorn_refuses_with_the_line_alone() -> None:
    done = start(PORT="http", DATABASE_URL="postgres://me:s3cret@[bad/db")
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert [line.split()[0] for line in lines] == ["PORT:", "DATABASE_URL"]
    assert "s3cret" not in done.stderr + done.stdout


def test_a_start_without_a_database_names_make_run() -> None:
    done = start()
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "make run" in line
    assert "DATABASE_URL" in line


def test_more_workers_than_connections_are_refused(postgres: Postgres) -> None:
    done = start("--workers=26", DATABASE_URL=postgres.url)
    assert done.returncode == 1
    line = refusal(done)
    assert line.startswith("DATABASE_MAX_CONNECTIONS: '25' is not allowed: ")
    assert "26 workers" in line


def test_no_more_workers_than_connections_by_default(postgres: Postgres) -> None:
    url = postgres.new_database()
    with Service(DATABASE_URL=url, DATABASE_MAX_CONNECTIONS="1") as service:
        wait_until(lambda: service.metrics().get_value("database_connections_max") == 1)
        assert service.metrics().get_value("signup_workers") == 1


def test_a_metrics_folder_that_cant_be_written(postgres: Postgres) -> None:
    done = start(DATABASE_URL=postgres.url, PROMETHEUS_MULTIPROC_DIR="/dev/null/metrics")
    assert done.returncode == 1
    line = refusal(done)
    assert line.startswith("PROMETHEUS_MULTIPROC_DIR: ")
    assert "Not a directory" in line
    assert "'/dev/null/metrics'" in line


# What percent-encoding leaves as it is, or need not be percent-encoded for libpq.
PASSWORDS = [
    "s3cret",
    "s3%40cret",
    "s3:cret",
    "s3'cret",
    's3"cret',
    "s3\\cret",
    "s3?cret",
    "s3 cret",
]


@pytest.mark.parametrize("password", PASSWORDS)
@pytest.mark.parametrize("how", ["user", "parameter"])
def test_no_refusal_prints_a_password(postgres: Postgres, password: str, how: str) -> None:
    host = postgres.url.partition("host=")[2]
    url = f"postgresql://postgres:{password}@/nonexistent?host={host}"
    if how == "parameter":
        url = f"postgresql://postgres@/nonexistent?host={host}&password={password}"
    for options, named in (([], url), ([f"--env=DATABASE_URL={url}"], "")):
        done = start("--workers=26", *options, LOG_LEVEL="debug", DATABASE_URL=named)
        assert done.returncode == 1
        assert "cret" not in done.stdout + done.stderr


@pytest.mark.parametrize("how", ["user", "parameter"])
def test_no_log_line_holds_a_password(postgres: Postgres, how: str) -> None:
    """Not of gunicorn's settings either, which it logs at this level."""
    url = postgres.new_database()
    url = url.replace(":right@", ":s3%40cret@")  # any password will do on this server
    if how == "parameter":
        url = url.replace(":s3%40cret@", "@") + "&password=s3cret"
    with Service(f"--env=DATABASE_URL={url}", DATABASE_URL=url, LOG_LEVEL="debug") as service:
        assert service.get("/readyz").status_code == 200
        execute(url, "ALTER TABLE users RENAME TO elsewhere")
        user = {"email": "ada@example.com", "first_name": "Ada", "last_name": "Lovelace"}
        assert service.signup(json=user).status_code == 500
        assert service.stop() == 0
        assert "UndefinedTable" in service.log()
        assert "cret" not in service.log()
