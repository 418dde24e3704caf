"""Fixtures: one PostgreSQL for all tests, and a database and a service for each module."""

from collections.abc import Iterator

import pytest

from testbed.database import Postgres
from testbed.programs import missing
from testbed.service import Service
from testbed.watched import Watched, watch


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    with Postgres() as postgres:
        yield postgres


@pytest.fixture
def url(postgres: Postgres) -> str:
    """Of an empty database."""
    return postgres.new_database()


@pytest.fixture(scope="module")
def database_url(postgres: Postgres) -> str:
    return postgres.new_database()


@pytest.fixture(scope="module")
def service(database_url: str) -> Iterator[Service]:
    """Four workers, which end a stuck statement soon, and whose pool is sampled often."""
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


@pytest.hookimpl(tryfirst=True)  # before xdist looks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tell pytest-xdist what stays in one process: all that uses `watched`, else a whole file.

    A test without fixtures, or with a database of its own, runs in whichever process is free.
    """
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        if fixtures and "url" not in fixtures:
            group = "watched" if "watched" in fixtures else item.path.stem
            item.add_marker(pytest.mark.xdist_group(group))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test that is marked with `needs` where one of the programs is missing."""
    for mark in item.iter_markers("needs"):
        if reason := missing(*mark.args):
            pytest.skip(reason)
