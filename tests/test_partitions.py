"""The service on a table partitioned by the folded email, as in docs/scaling.md."""

import re

from testbed import ROOT
from testbed.database import Postgres, count_users, execute
from testbed.service import Service

from .test_table import race

PARTS, EMAILS = 8, 40


def partitioned_table() -> str:
    """Return the DDL of docs/scaling.md, step 6."""
    text = (ROOT / "docs/scaling.md").read_text()
    (found,) = re.findall(r"```sql\n(CREATE TABLE users .*?)```", text, re.DOTALL)
    return str(found)


def test_email_is_unique_across_partitions(postgres: Postgres) -> None:
    url = postgres.new_database()
    execute(url, partitioned_table())
    before = postgres.dump(url, "--table=users*")
    emails = [f"User{n}@Example.com" for n in range(EMAILS)]
    with Service(DATABASE_URL=url, WEB_CONCURRENCY="2") as service:
        assert postgres.dump(url, "--table=users*") == before  # the start does not alter the table
        race(service, emails, clients=20)
        service.check_equalities(count_users(url))
    used = execute(url, "SELECT count(DISTINCT tableoid), count(DISTINCT id) FROM users")
    assert used == [(PARTS, EMAILS)]
    folded = execute(url, "SELECT email_folded FROM users ORDER BY id")
    assert {email for (email,) in folded} == {email.lower() for email in emails}
