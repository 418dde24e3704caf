"""Fixtures: one PostgreSQL per pytest process, one database and one service per module."""

from collections.abc import Iterator

import pytest

from testbed.database import Postgres
from testbed.programs import missing
from testbed.service import Service
from testbed.watched import Watched, watch

MODULE_FIXTURES = {"cluster", "database_url", "project", "server"}
LONGEST = ("test_alerts", "test_rules", "test_slots")


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    with Postgres() as postgres:
        yield postgres


@pytest.fixture
def url(postgres: Postgres) -> str:
    """Create an empty database and return its URL."""
    return postgres.new_database()


@pytest.fixture(scope="module")
def database_url(postgres: Postgres) -> str:
    return postgres.new_database()


@pytest.fixture(scope="module")
def service(database_url: str) -> Iterator[Service]:
    """Start four workers with a 2 s statement timeout and a pool sampled every 50 ms."""
    with Service(
        DATABASE_URL=database_url,
        WEB_CONCURRENCY="4",
        METRICS_SAMPLE_INTERVAL="0.05",
        DATABASE_STATEMENT_TIMEOUT="2",
    ) as service:
        service.wait_for(database_connections_max=25)
        yield service


@pytest.fixture(scope="session")
def watched(postgres: Postgres) -> Iterator[Watched]:
    with watch(postgres) as watched:
        yield watched


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep tests in one pytest-xdist process: all that use `watched`, or a fixture of their module.

    Any other test runs in any free process. The longest tests start first.
    """
    items.sort(key=lambda item: item.path.stem not in LONGEST)
    for item in items:
        fixtures = set(getattr(item, "fixturenames", ()))  # with those that they use
        if "watched" in fixtures:
            item.add_marker(pytest.mark.xdist_group("watched"))
        elif fixtures & MODULE_FIXTURES:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test marked with `needs` if one of its programs is missing."""
    for mark in item.iter_markers("needs"):
        if reason := missing(*mark.args):
            pytest.skip(reason)
