"""The HTTP contract: signups and failures; tests/test_hostile.py has every refusal of a request."""

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from testbed.database import broken_table, count_users, execute, locked_table
from testbed.service import USER, Service, user

RFC3339 = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z")


@pytest.fixture(autouse=True)
def equalities_hold_after_each_test(service: Service, database_url: str) -> Iterator[None]:
    yield
    service.check_equalities(count_users(database_url))


def test_valid_signup_returns_201_and_the_stored_user(service: Service, database_url: str) -> None:
    names = {"first_name": "Zoë 𝒜", "last_name": "O'Brien\"; DROP TABLE users; --%s"}
    response = service.signup(json={"email": " Ada.1@Example.com "} | names)
    assert response.status_code == 201
    assert response.headers["Content-Type"] == "application/json"
    user = response.json()["user"]
    assert response.json() == {"message": "user created successfully", "user": user}
    row = execute(
        database_url,
        "SELECT id, email, first_name, last_name, created_at, updated_at FROM users"
        " WHERE lower(email) = 'ada.1@example.com'",
    )[0]
    assert list(user) == ["id", "email", "first_name", "last_name", "created_at", "updated_at"]
    assert (user["id"], user["email"], user["first_name"], user["last_name"]) == row[:4]
    assert names | {"email": "Ada.1@example.com"} == {n: user[n] for n in USER}
    for name, stored in zip(("created_at", "updated_at"), row[4:], strict=True):
        assert RFC3339.fullmatch(user[name])
        assert datetime.fromisoformat(user[name]) == stored
        assert abs(datetime.now(UTC) - stored) < timedelta(minutes=5)


@pytest.mark.parametrize(
    ("first", "again"),
    [
        ("twice@example.com", "twice@example.com"),
        ("ΣΊΣΥΦΟΣ@example.com", "σίσυφος@example.com"),
        ("jose\u0301@example.com", "JOSÉ@example.com"),
        ("İvan@example.com", "i\u0307VAN@example.com"),
        ("ada@ΣΊΣΥΦΟΣ.gr", "ADA@σίσυφοσ.gr"),
    ],
)
def test_duplicate_email_in_any_case_returns_409(service: Service, first: str, again: str) -> None:
    assert service.signup(json=USER | {"email": first}).status_code == 201
    response = service.signup(json=USER | {"email": again})
    assert response.status_code == 409
    assert response.json() == {"error": "email already exists"}


def test_database_error_returns_500(service: Service, database_url: str) -> None:
    with broken_table(database_url):
        response = service.signup(json=user("lost"))
    assert response.status_code == 500
    assert response.json() == {"error": "failed to create user"}
    assert service.signup(json=user("lost")).status_code == 201


def test_pool_timeout_returns_503_with_retry_after(url: str) -> None:
    settings: dict[str, Any] = {
        "DATABASE_MAX_CONNECTIONS": "1",
        "DATABASE_POOL_TIMEOUT": "0.2",
        "DATABASE_STATEMENT_TIMEOUT": "30",
    }
    with (
        Service(DATABASE_URL=url, WEB_CONCURRENCY="1", **settings) as service,
        ThreadPoolExecutor(1) as executor,
    ):
        assert service.get("/readyz").status_code == 200
        with locked_table(url):
            holder = executor.submit(service.signup, json=USER)
            service.wait_for(signup_requests_in_flight=1, database_pool_wait_seconds_count=1)
            response = service.signup(json=USER)
            assert response.status_code == 503
            assert response.headers["Retry-After"] == "1"
            assert response.json() == {"error": "service is busy, retry later"}
            assert service.get("/readyz").status_code == 503
            assert service.get("/healthz").status_code == 200
        assert holder.result().status_code == 201
        assert service.get("/readyz").status_code == 200
        # Of both signups, and of no probe.
        service.wait_for(database_pool_timeouts_total=1, database_pool_wait_seconds_count=2)
        service.check_equalities(rows=1)
