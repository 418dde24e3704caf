"""deploy/create-role.sh: it does what it says, or nothing."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, quote, urlsplit

import psycopg2
import pytest
import yaml

from testbed import ROOT
from testbed.database import Postgres, execute
from testbed.service import USER, Service

NAME = "SIGNUP_DATABASE_PASSWORD"
BOTH = {NAME: "x", "POSTGRES_PASSWORD": "x'\\"}
ACCESS = "local all signup scram-sha-256\nlocal all outsider peer\nlocal all all trust"
LOG = "log_statement = all\nlog_min_duration_statement = 0\nlog_transaction_sample_rate = 1"
WITH_PASSWORD = "SELECT rolname FROM pg_authid WHERE rolpassword IS NOT NULL ORDER BY rolname"


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    """Start a server that logs each statement and asks the role `signup` for its password."""
    with Postgres() as server:
        (server.server.data / "pg_hba.conf").write_text(ACCESS)
        (server.server.data / "postgresql.auto.conf").write_text(LOG)
        execute(server.url, "CREATE ROLE plain LOGIN CREATEROLE CREATEDB")
        execute(server.url, "SELECT pg_reload_conf()")
        yield server


def create_role(server: Postgres, *options: str, **env: str) -> "subprocess.CompletedProcess[str]":
    path = f"{server.server._programs}:{os.environ['PATH']}"
    env = {"PATH": path, "PGHOST": parse_qs(urlsplit(server.url).query)["host"][0]} | env
    command = ["/bin/sh", str(ROOT / "deploy/create-role.sh"), *options]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)


def refused(server: Postgres, status: int, cause: str, options: str, env: dict[str, str]) -> None:
    """Check that the script prints one line with the cause, and changes nothing."""
    state = "SELECT r::text FROM pg_authid r UNION SELECT d::text FROM pg_database d ORDER BY 1"
    before = execute(server.url, state)
    done = create_role(server, *options.split(), **env)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (status, "", 1), done.stderr
    assert cause in done.stderr and execute(server.url, state) == before


def test_a_refusal_changes_nothing_and_says_why(server: Postgres) -> None:
    refused(server, 2, "usage: SIGNUP_DATABASE_PASSWORD=... sh ", "", {})
    refused(server, 2, "usage: ", "", BOTH | {NAME: ""})
    refused(server, 2, "requires POSTGRES_PASS", "--with-superuser-password", {NAME: "x"})
    refused(server, 1, "psql not found", "", BOTH | {"PATH": "/nowhere"})
    refused(server, 1, "No such file or directory", "--host=/nowhere", BOTH)
    refused(server, 1, "Connection refused", "--host=127.0.0.1 --port=1", BOTH)
    refused(server, 1, 'role "nobody" does not exist', "--username=nobody", BOTH)
    refused(server, 1, "sudo -u postgres --preserve-env=", "--username=outsider", BOTH)
    refused(server, 1, '"plain" is not a superuser', "--username=plain", BOTH)
    execute(server.url, "CREATE ROLE signup SUPERUSER")
    refused(server, 1, '"signup" is a superuser', "", BOTH)
    execute(server.url, "DROP ROLE signup")


def test_the_role_can_run_the_service_and_nothing_else(server: Postgres, tmp_path: Path) -> None:
    (tmp_path / "psqlrc").write_text("\\set AUTOCOMMIT off\nSELECT broken;\n")
    env = {"PSQLRC": str(tmp_path / "psqlrc"), "PGCLIENTENCODING": "LATIN1"}
    assert create_role(server, **{NAME: "Secret \udcff"}).returncode == 1  # not valid UTF-8
    for password in ("Secret", "Secret p@:/#%$'\"\\{}\t$(id) `id` :name äß;--\n"):
        done = create_role(server, POSTGRES_PASSWORD="Secret", **env, **{NAME: password})
        assert (done.returncode, done.stderr) == (0, ""), done
    assert execute(server.url, WITH_PASSWORD) == [("signup",)]
    url = server.url.replace("postgres@/postgres", f"signup:{quote(password, safe='')}@/signup")
    with Service(DATABASE_URL=url) as service:
        assert service.signup(json=USER).status_code == 201
    with pytest.raises(psycopg2.OperationalError, match="password authentication failed"):
        execute(url.replace("signup:", "signup:x"), "SELECT")
    for sql in ("CREATE SCHEMA x", "CREATE TEMP TABLE x ()", "CREATE ROLE x", "CREATE DATABASE x"):
        with pytest.raises(psycopg2.errors.InsufficientPrivilege):
            execute(url, sql)
    log = (server.server.data / "log").read_text()
    assert "CREATE DATABASE signup" in log and "Secret" not in log


def test_compose_sets_the_password_of_the_superuser_too(server: Postgres) -> None:
    role = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["role"]
    option = role["entrypoint"][2].split()[-1]
    assert create_role(server, option, **BOTH).returncode == 0
    assert execute(server.url, WITH_PASSWORD) == [("postgres",), ("signup",)]
