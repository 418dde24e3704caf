"""The table `users`: created where there is none, checked where there is one, never altered."""

import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import datetime
from threading import Barrier

import pytest

from signup.config import Config, ConfigError
from signup.database import PASSING, TABLES, prepare_table
from testbed import ROOT, wait_until
from testbed.database import Postgres, count_users, execute
from testbed.faults import too_many_connections, wrong_password
from testbed.service import USER, Service, refused_start, user

SCHEMA, _ = TABLES["users"]
COLUMNS = "first_name text, last_name text, created_at timestamptz, updated_at timestamptz"
# Tables of others, or of older versions, and what the refusal names.
FOREIGN = {
    "CREATE TABLE users (name text); INSERT INTO users VALUES (NULL)": 'column "email"',
    f"CREATE TABLE users (id bigint, email text UNIQUE, {COLUMNS});"
    "INSERT INTO users VALUES (1, NULL)": 'column "email_folded"',
    f"CREATE TABLE users (id bigint, email text, email_folded text UNIQUE, {COLUMNS});"
    "ALTER TABLE users DROP COLUMN updated_at": 'column "updated_at"',
    f"CREATE TABLE users (id bigint, email text, email_folded text, {COLUMNS})": "no unique index",
    f"CREATE TABLE users (id bigint, email text, email_folded text, {COLUMNS});"
    "CREATE UNIQUE INDEX ON users (email_folded, email)": "no unique index",
    f"CREATE TABLE users (id bigint, email text, email_folded text, {COLUMNS});"
    "CREATE UNIQUE INDEX ON users (email_folded) WHERE id > 0": "no unique index",
    f"CREATE TABLE users (id uuid, email text, email_folded text UNIQUE, {COLUMNS})": "bigint",
    "CREATE VIEW users AS SELECT 1 AS email": 'column "email_folded"',
}


def refusal(url: str) -> str:
    """Return the one line with which the check of the start refuses `url`."""
    with pytest.raises(ConfigError) as caught:
        prepare_table(Config.from_env({"DATABASE_URL": url}))
    (line,) = str(caught.value).splitlines()
    assert line.startswith("the database can't be used: ")
    return line


def role(url: str) -> str:
    return url.partition("//")[2].partition(":")[0]


def test_database_with_another_encoding_than_utf8_is_refused(postgres: Postgres) -> None:
    done = refused_start(DATABASE_URL=postgres.new_database("ENCODING 'SQL_ASCII'"))
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("{")]
    assert line == "the database can't be used: its encoding is not UTF8"


def test_start_waits_for_the_database_and_logs_each_cause_once() -> None:
    causes = ["No such file", "not accepting connections", "too many connections", "read-only"]
    with Postgres() as server, ThreadPoolExecutor(1) as executor, ExitStack() as stack:
        url = server.new_database()
        execute(server.url, "ALTER SYSTEM SET hot_standby = off")
        execute(server.url, f"ALTER ROLE {role(url)} SET default_transaction_read_only = on")
        server.stop()
        service = Service(DATABASE_URL=url, WEB_CONCURRENCY="1")
        start = executor.submit(service.__enter__)
        wait_until(lambda: hasattr(service, "process"))
        stack.push(service)
        wait_until(lambda: causes[0] in service.log())
        (server.server.data / "standby.signal").touch()
        server.restart()
        wait_until(lambda: causes[1] in service.log())
        server.server.run("pg_ctl", "-D", server.server.data, "-w", "promote")
        admin = Config.from_env({"DATABASE_URL": server.url})
        wait_until(lambda: not prepare_table(admin))  # pg_ctl looks at a file
        with too_many_connections(server, url):
            wait_until(lambda: causes[2] in service.log())
        wait_until(lambda: causes[3] in service.log())
        execute(server.url, f"ALTER ROLE {role(url)} RESET ALL")
        assert start.result().signup(json=USER).status_code == 201
        assert [service.log().count(cause) for cause in causes] == [1] * 4


# The texts of libpq, PostgreSQL, PgBouncer and Supavisor.
PASS = (
    *("[Errno -2] Name or service not known", "the database did not answer in time"),
    *("timeout expired: Connection timed out", "Network is unreachable", "No route to host"),
    "connection is bad: Resource temporarily unavailable",
    *("Connection reset by peer", "server closed the connection unexpectedly"),
    *("SSL SYSCALL error: EOF detected", "FATAL:  the database system is in recovery mode"),
    *("session is not in hot standby mode", "FATAL:  sorry, too many clients already"),
    "FATAL:  remaining connection slots are reserved for roles with SUPERUSER",
    *("FATAL:  no more connections allowed (max_client_conn)", "FATAL:  query_wait_timeout"),
    *("FATAL:  pgbouncer is shutting down", "FATAL:  server conn crashed?"),
    "FATAL:  (EMAXCONNSESSION) max clients reached in session mode",
    "FATAL:  server login has been failing, try again later (server_login_retry)",
)
STAY = (
    "FATAL:  cached error: password authentication failed (server_login_retry)",
    *("FATAL:  no such database: other", "server does not support SSL, but SSL was required"),
    'FATAL:  no pg_hba.conf entry for host "10.0.0.1", user "signup"',
)


@pytest.mark.parametrize("message", [*PASS, *STAY])
def test_what_may_pass_is_waited_for(message: str) -> None:
    found = PASSING.search(f"OperationalError: 10.0.0.1 5432: {message}")
    assert bool(found) == (message in PASS)


def test_refused_login_or_parameter_ends_the_start(postgres: Postgres, url: str) -> None:
    with wrong_password(postgres, url):
        assert "password authentication failed" in refusal(url)
    assert 'role "other" does not exist' in refusal(url.replace(f"//{role(url)}", "//other"))
    assert 'database "other" does not exist' in refusal(url.replace(f"/{role(url)}?", "/other?"))
    assert 'invalid sslmode value: "on"' in refusal(f"{url},127.0.0.1:1&sslmode=on")


@pytest.mark.parametrize("ddl", FOREIGN)
def test_table_of_another_application_is_refused_unchanged(
    postgres: Postgres, url: str, ddl: str
) -> None:
    execute(url, ddl)
    before = postgres.dump(url)
    line = refusal(url)
    assert FOREIGN[ddl] in line
    assert line.endswith(": see An existing table in docs/production.md")
    assert postgres.dump(url) == before


def test_role_needs_create_once_then_no_more_than_insert_and_what_is_returned(
    postgres: Postgres, url: str
) -> None:
    admin = postgres.admin_url(url)
    execute(admin, f"REVOKE CREATE ON SCHEMA public FROM {role(url)}")
    assert "permission denied for schema public" in refusal(url)
    execute(admin, SCHEMA.read_text())
    assert "permission denied for table users" in refusal(url)
    columns = "email, email_folded, first_name, last_name, created_at, updated_at"
    execute(admin, f"GRANT INSERT ({columns}) ON users TO {role(url)}")
    execute(admin, f"GRANT SELECT (id, email_folded, created_at) ON users TO {role(url)}")
    with Service(DATABASE_URL=url, WEB_CONCURRENCY="1") as service:
        assert [service.signup(json=USER).status_code for _ in range(2)] == [201, 409]


def test_instances_that_start_at_once_create_one_table(postgres: Postgres) -> None:
    instances = 8
    barrier = Barrier(instances)

    def start(config: Config) -> None:
        barrier.wait(timeout=60)
        prepare_table(config)

    with ThreadPoolExecutor(instances) as executor:
        for _ in range(5):
            url = postgres.new_database()
            list(executor.map(start, [Config.from_env({"DATABASE_URL": url})] * instances))
            assert count_users(url) == 0


def test_only_a_known_email_is_a_409(url: str) -> None:
    with Service(DATABASE_URL=url, WEB_CONCURRENCY="1") as service:
        for n in range(2):
            assert service.signup(json=user(f"known{n}")).status_code == 201
        # As after a logical replication, which copies no sequence.
        execute(url, "ALTER TABLE users ALTER id RESTART WITH 1")
        execute(url, "CREATE UNIQUE INDEX ON users (first_name) WHERE first_name = 'Once'")
        assert service.signup(json=user("new")).status_code == 500
        assert "users_pkey" in service.log()
        assert service.signup(json=user("KNOWN1")).status_code == 409
        execute(url, "ALTER TABLE users ALTER id RESTART WITH 100")
        assert service.signup(json=user("one") | {"first_name": "Once"}).status_code == 201
        assert service.signup(json=user("two") | {"first_name": "Once"}).status_code == 500
        assert service.signup(json=user("new")).status_code == 201
        service.check_equalities(count_users(url))


@pytest.mark.parametrize("isolation", ["serializable", "repeatable read"])
def test_race_for_one_email_has_one_winner_in_any_isolation(
    postgres: Postgres, url: str, isolation: str
) -> None:
    setting = f"default_transaction_isolation = '{isolation}'"
    execute(postgres.url, f"ALTER ROLE {role(url)} SET {setting}")
    with Service(DATABASE_URL=url, WEB_CONCURRENCY="2") as service:
        race(service, [f"race{n}@example.com" for n in range(20)], clients=8)


def test_email_is_unique_across_the_partitions_of_scaling_md(postgres: Postgres, url: str) -> None:
    page = (ROOT / "docs/scaling.md").read_text()
    (ddl,) = re.findall(r"```sql\n(CREATE TABLE users .*?)```", page, re.DOTALL)
    execute(url, ddl)
    before = postgres.dump(url, "--table=users*")
    emails = [f"User{n}@Example.com" for n in range(40)]
    with Service(DATABASE_URL=url, WEB_CONCURRENCY="2") as service:
        assert postgres.dump(url, "--table=users*") == before  # the start does not alter the table
        race(service, emails, clients=20)
        service.check_equalities(count_users(url))
    used = execute(url, "SELECT count(DISTINCT tableoid), count(DISTINCT id) FROM users")
    assert used == [(2, len(emails))]
    folded = execute(url, "SELECT email_folded FROM users")
    assert {email for (email,) in folded} == {email.lower() for email in emails}


def race(service: Service, emails: list[str], clients: int) -> None:
    """Send each email from all clients at once, in two spellings: one of them gets a 201."""
    barrier = Barrier(clients)

    def client(number: int) -> None:
        for email in emails:
            barrier.wait(timeout=60)
            service.signup(json=USER | {"email": email if number % 2 else email.upper()})

    with ThreadPoolExecutor(clients) as executor:
        list(executor.map(client, range(clients)))
    assert service.answers == {201: len(emails), 409: len(emails) * (clients - 1)}


def test_table_needs_no_defaults_for_the_times(url: str) -> None:
    execute(url, SCHEMA.read_text().replace("timestamptz NOT NULL DEFAULT now()", "timestamp"))
    with Service(DATABASE_URL=url, WEB_CONCURRENCY="1") as service:
        created = service.signup(json=USER).json()["user"]["created_at"]
        stored = "SELECT CAST(created_at AS timestamptz), updated_at = created_at FROM users"
        assert execute(url, stored) == [(datetime.fromisoformat(created), True)]
