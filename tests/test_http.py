"""The HTTP contract, row by row, against real workers and a real PostgreSQL."""

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest
import requests

from testbed import wait_until
from testbed.database import broken_table, count_users, execute, locked_table
from testbed.service import USER, Service, user

RFC3339 = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z")


@pytest.fixture(autouse=True)
def equalities_hold_after_each_test(service: Service, database_url: str) -> Iterator[None]:
    yield
    service.check_equalities(count_users(database_url))


def test_valid_signup_returns_201_and_the_stored_user(service: Service, database_url: str) -> None:
    response = service.signup(json=USER | {"email": " Ada.1@Example.com "})
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
    assert user["email"] == "Ada.1@example.com"
    for name, stored in zip(("created_at", "updated_at"), row[4:], strict=True):
        assert RFC3339.fullmatch(user[name])
        assert datetime.fromisoformat(user[name]) == stored
        assert abs(datetime.now(UTC) - stored) < timedelta(minutes=5)


def test_content_type_is_ignored(service: Service) -> None:
    data = json.dumps(user("form"))
    headers = {"Content-Type": "application/x-www-form-urlencoded"}  # what plain `curl -d` sends
    assert service.signup(data=data, headers=headers).status_code == 201


def test_names_are_stored_and_returned_as_sent(service: Service, database_url: str) -> None:
    names = {"first_name": "Zoë 𝒜", "last_name": "O'Brien\"; DROP TABLE users; --%s"}
    response = service.signup(json={"email": "zoe@example.com"} | names)
    assert response.status_code == 201
    assert names.items() <= response.json()["user"].items()
    stored = execute(database_url, "SELECT last_name FROM users WHERE email = 'zoe@example.com'")
    assert stored == [(names["last_name"],)]


@pytest.mark.parametrize(
    ("first", "again"),
    [
        ("twice@example.com", "twice@example.com"),
        ("Upper@Example.com", "uPPER@example.COM"),
        ("ärger@example.com", "ÄRGER@example.com"),
        ("ΣΊΣΥΦΟΣ@example.com", "σίσυφος@example.com"),
        ("jose\u0301@example.com", "JOSÉ@example.com"),
        ("straße@example.com", "STRASSE@example.com"),
        ("İvan@example.com", "i\u0307VAN@example.com"),
        ("\u212aelvin@example.com", "kelvin@example.com"),
        ("ada@ΣΊΣΥΦΟΣ.gr", "ADA@σίσυφοσ.gr"),
    ],
)
def test_duplicate_email_in_any_case_returns_409(service: Service, first: str, again: str) -> None:
    assert service.signup(json=USER | {"email": first}).status_code == 201
    response = service.signup(json=USER | {"email": again})
    assert response.status_code == 409
    assert response.json() == {"error": "email already exists"}


@pytest.mark.parametrize(
    "data",
    [b"", b"not json", b"[1]", b'{"email": 1}', b"\xff\xfe", b'{"email": "\xe9@example.com"}'],
)
def test_invalid_json_object_returns_400(service: Service, data: bytes) -> None:
    response = service.signup(data=data)
    assert response.status_code == 400
    assert response.json() == {"error": "invalid request body"}


@pytest.mark.parametrize("chunked", [False, True])
def test_too_large_body_returns_413(service: Service, chunked: bool) -> None:
    data = b'{"email": "' + b"x" * 16384 + b'"}'
    response = service.signup(data=iter([data[:100], data[100:]]) if chunked else data)
    assert response.status_code == 413
    assert response.json() == {"error": "request body too large"}


@pytest.mark.parametrize("chunked", [False, True])
def test_largest_allowed_body_returns_201(service: Service, chunked: bool) -> None:
    data = json.dumps(user(f"large{chunked}")).encode()
    data += b" " * (16384 - len(data))
    response = service.signup(data=iter([data[:100], data[100:]]) if chunked else data)
    assert response.status_code == 201


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"email": ""}, "email is required"),
        ({"email": "invalid"}, "email is not valid: An email address must have an @-sign."),
        ({"first_name": " "}, "first name is required"),
        ({"first_name": "x" * 101}, "first name must be at most 100 characters"),
        ({"last_name": "a\x00b"}, "last name must not contain control or invisible characters"),
    ],
)
def test_invalid_field_returns_400(service: Service, change: dict[str, str], error: str) -> None:
    response = service.signup(json=USER | change)
    assert response.status_code == 400
    assert response.json() == {"error": error, "field": next(iter(change))}


@pytest.mark.parametrize(
    "method", ["GET", "HEAD", "OPTIONS", "PUT", "PATCH", "DELETE", "TRACE", "PROPFIND"]
)
def test_other_methods_return_405(service: Service, method: str) -> None:
    response = service.signup(method)
    assert response.status_code == 405
    assert response.headers["Allow"] == "POST"
    if method != "HEAD":
        assert response.json() == {"error": "method not allowed"}


def test_database_error_returns_500(service: Service, database_url: str) -> None:
    with broken_table(database_url):
        response = service.signup(json=user("lost"))
    assert response.status_code == 500
    assert response.json() == {"error": "failed to create user"}
    assert service.signup(json=user("lost")).status_code == 201


@pytest.mark.parametrize("path", ["/nothing", "/signup/", "//signup", "/SIGNUP", "/static/x"])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_other_paths_return_404(service: Service, method: str, path: str) -> None:
    request = requests.Request(method, service.url, json=USER).prepare()
    request.url = service.url + path  # requests would normalize the path
    response = requests.Session().send(request, timeout=30)
    assert response.status_code == 404
    assert response.json() == {"error": "not found"}


def test_welcome_and_health_endpoints_return_200(service: Service) -> None:
    assert service.get("/").json() == {"message": "welcome"}
    for path in ("/", "/healthz", "/readyz"):
        assert service.get(path).status_code == 200


def test_pool_timeout_returns_503_with_retry_after(url: str) -> None:
    with (
        Service(
            DATABASE_URL=url,
            WEB_CONCURRENCY="1",
            DATABASE_MAX_CONNECTIONS="1",
            DATABASE_POOL_TIMEOUT="0.2",
            DATABASE_STATEMENT_TIMEOUT="30",
            METRICS_SAMPLE_INTERVAL="0.05",
        ) as service,
        ThreadPoolExecutor(1) as executor,
    ):
        with locked_table(url):
            holder = executor.submit(service.signup, json=USER)
            wait_until(lambda: service.metrics().get_value("database_connections", state="in_use"))
            response = service.signup(json=USER)
            assert response.status_code == 503
            assert response.headers["Retry-After"] == "1"
            assert response.json() == {"error": "service is busy, retry later"}
            assert service.get("/readyz").status_code == 503
            assert service.get("/healthz").status_code == 200
        assert holder.result().status_code == 201
        assert service.metrics().get_value("database_pool_timeouts_total") == 1
        service.check_equalities(rows=1)
        assert service.get("/readyz").status_code == 200
