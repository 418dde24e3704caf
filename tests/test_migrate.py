"""`python -m signup.migrate`: older tables, while an older service takes signups."""

import pytest

from drills.migrate import GUIDE_TABLE, INSERT, drill, run
from signup.config import Config
from signup.database import prepare_table
from signup.migrate import main
from testbed.database import Postgres, execute, session
from testbed.service import USER, Service

OLDER_TABLE = """
CREATE TABLE users (
    id         bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    email      text NOT NULL CHECK (char_length(email) <= 254),
    first_name text NOT NULL CHECK (char_length(first_name) <= 100),
    last_name  text NOT NULL CHECK (char_length(last_name) <= 100),
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now()
);
CREATE UNIQUE INDEX users_email_key ON users (lower(email));
"""
HALF_MIGRATED = OLDER_TABLE + "ALTER TABLE users ADD COLUMN email_folded text UNIQUE;"
ROWS = "SELECT id, email, first_name, last_name, created_at, updated_at FROM users ORDER BY id"


def refusal(url: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Migrate `url`, and return the line with which that is refused."""
    monkeypatch.setenv("DATABASE_URL", url)
    monkeypatch.setattr("sys.argv", ["migrate"])
    with pytest.raises(SystemExit) as caught:
        main()
    (line,) = str(caught.value).splitlines()
    return line


def test_signups_of_the_older_service_go_on(postgres: Postgres) -> None:
    report = drill(postgres, rows=20_000)
    assert [report[figure] for figure in ("failed", "wrong", "lost")] == [0, 0, 0]
    assert report["memory"] < 150


@pytest.mark.parametrize("table", [GUIDE_TABLE, OLDER_TABLE, HALF_MIGRATED])
def test_older_table_serves_both_versions_then_the_new_one(postgres: Postgres, table: str) -> None:
    url = postgres.new_database(options="")
    execute(url, table)
    for email in ("N7@example.com", "JOSÉ@example.com", "A@Straße.de", "odd@-example"):
        execute(url, INSERT.format(email))
    before = execute(url, ROWS)
    for _ in range(2):  # the second run finds nothing to do
        assert run(url)[0] == 0
    assert execute(url, ROWS) == before
    with Service(DATABASE_URL=url, WEB_CONCURRENCY="1") as service:
        # The older version, which still runs, knows nothing of email_folded.
        execute(url, INSERT.format("OLD@Example.com"))
        for email in ("n7@example.com", "josé@EXAMPLE.com", "a@straße.de", "old@example.com"):
            assert service.signup(json=USER | {"email": email}).status_code == 409
        assert service.signup(json=USER | {"email": "a@strasse.de"}).status_code == 201
        execute(url, INSERT.format("ÉLISE@example.com"))  # folded by the next run
        for _ in range(2):
            status, _, output = run(url, "--finish")
            assert (status, output.splitlines()[-1]) == (0, "done")
        assert service.signup(json=USER | {"email": "élise@example.com"}).status_code == 409
    fresh = postgres.new_database()
    prepare_table(Config.from_env({"DATABASE_URL": fresh}))
    indexed = "SELECT indkey, indisvalid FROM pg_index WHERE indrelid = 'users'::regclass"
    assert len(execute(url, indexed)) == len(execute(fresh, indexed)) == 2
    required = "SELECT attnotnull FROM pg_attribute WHERE attname = 'email_folded' AND attnum > 0"
    assert execute(url, required)[0] == (True,)
    assert execute(url, "SELECT FROM pg_trigger WHERE tgrelid = 'users'::regclass") == []


def test_rows_folded_by_an_older_rule_are_folded_anew(url: str) -> None:
    with Service(DATABASE_URL=url, WEB_CONCURRENCY="1") as service:
        assert service.signup(json=USER | {"email": "B@straße.de"}).status_code == 201
        execute(url, "UPDATE users SET email_folded = 'b@strasse.de'")
        assert service.signup(json=USER | {"email": "b@strasse.de"}).status_code == 409
        assert run(url)[0] == 0  # while the service runs
        assert service.signup(json=USER | {"email": "b@strasse.de"}).status_code == 201
        assert service.signup(json=USER | {"email": "b@straße.de"}).status_code == 409


@pytest.mark.parametrize(
    ("table", "one", "two"),
    [
        (GUIDE_TABLE, "a@x.de", "A@x.de"),
        (OLDER_TABLE, "é@x.de", "É@x.de"),
        (HALF_MIGRATED, "é@x.de", "É@x.de"),
    ],
)
def test_emails_that_differ_in_case_only_are_listed_by_id(
    postgres: Postgres, monkeypatch: pytest.MonkeyPatch, table: str, one: str, two: str
) -> None:
    url = postgres.new_database(options="")
    execute(url, table.replace("lower(email)", "email"))
    for email in (one, "other@x.de", two):
        execute(url, INSERT.format(email))
    before, dump = execute(url, ROWS), postgres.dump(url)
    assert "by id: 1, 3: keep one" in refusal(url, monkeypatch)
    assert execute(url, ROWS) == before
    assert table != GUIDE_TABLE or postgres.dump(url) == dump  # seen before anything is changed
    execute(url, INSERT.format("later@x.de"))  # the older service goes on
    execute(url, "DELETE FROM users WHERE id = 3")
    assert run(url)[0] == 0


def test_other_tables_are_refused_unchanged(
    postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    for ddl in (
        "",
        "CREATE TABLE users (name text)",
        GUIDE_TABLE.replace("UNIQUE", ""),
        GUIDE_TABLE.replace("VARCHAR(255) UNIQUE", "text, other text UNIQUE"),
        GUIDE_TABLE.replace("UNIQUE NOT NULL", "UNIQUE"),
        GUIDE_TABLE.replace("SERIAL", "uuid"),
        GUIDE_TABLE.replace("VARCHAR(255) UNIQUE", "text UNIQUE NOT NULL, password text"),
    ):
        url = postgres.new_database()
        execute(url, ddl or "SELECT 1")
        before = postgres.dump(url)
        assert refusal(url, monkeypatch).startswith("no table users of an older version: see ")
        assert postgres.dump(url) == before


def test_other_arguments_are_refused(url: str) -> None:
    execute(url, GUIDE_TABLE)
    for argument in ("--help", "--finsh"):
        status, _, output = run(url, argument)
        assert (status, output) == (1, "usage: python -m signup.migrate [--finish]\n")


def test_missing_fold_may_take_the_place_of_an_older_one(url: str) -> None:
    execute(url, HALF_MIGRATED)
    for email in ("b@strasse.de", "b@straße.de"):
        execute(url, INSERT.format(email))
    execute(url, "UPDATE users SET email_folded = 'b@strasse.de' WHERE id = 2")
    assert run(url)[0] == 0
    folded = execute(url, "SELECT email_folded FROM users ORDER BY id")
    assert folded == [("b@strasse.de",), ("b@straße.de",)]


def test_table_in_use_is_refused_in_one_line(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    execute(url, GUIDE_TABLE)
    monkeypatch.setattr("signup.migrate.TRIES", 1)
    with session(url) as backup:
        backup.execute("BEGIN; SELECT FROM users")
        assert "uses the table: run this again" in refusal(url, monkeypatch)
    assert run(url)[0] == 0
