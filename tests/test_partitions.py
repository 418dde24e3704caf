"""The service on a table partitioned by the folded email, as in docs/scaling.md."""

import re
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

from testbed import ROOT
from testbed.database import Postgres, count_users, execute
from testbed.service import USER, Service

PARTS, CLIENTS, EMAILS = 8, 20, 40
STRUCTURE = """
SELECT relname, relkind::text, pg_get_expr(relpartbound, pg_class.oid),
    pg_get_partkeydef(pg_class.oid), relnatts
FROM pg_class WHERE relnamespace = 'public'::regnamespace ORDER BY relname
"""


def partitioned_table() -> str:
    """Return the DDL of docs/scaling.md, step 6."""
    text = (ROOT / "docs/scaling.md").read_text()
    (found,) = re.findall(r"```sql\n(CREATE TABLE users .*?)```", text, re.DOTALL)
    return str(found)


def test_email_is_unique_across_partitions(postgres: Postgres) -> None:
    url = postgres.new_database()
    execute(url, partitioned_table())
    before = execute(url, STRUCTURE)
    emails = [f"User{n}@Example.com" for n in range(EMAILS)]
    barrier = Barrier(CLIENTS)

    with Service(DATABASE_URL=url, WEB_CONCURRENCY="2") as service:
        assert execute(url, STRUCTURE) == before  # the start does not alter the table

        def race(client: int) -> None:
            for email in emails:
                barrier.wait(timeout=60)
                service.signup(json=USER | {"email": email if client % 2 else email.upper()})

        with ThreadPoolExecutor(CLIENTS) as executor:
            for done in [executor.submit(race, client) for client in range(CLIENTS)]:
                done.result()
        assert service.answers == {201: EMAILS, 409: EMAILS * (CLIENTS - 1)}
        service.check_equalities(count_users(url))

    used = execute(url, "SELECT count(DISTINCT tableoid), count(DISTINCT id) FROM users")
    assert used == [(PARTS, EMAILS)]
    folded = execute(url, "SELECT email_folded FROM users ORDER BY id")
    assert {email for (email,) in folded} == {email.lower() for email in emails}
