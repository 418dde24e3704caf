"""The log: JSON, with the request's id, without personal data."""

import json

import pytest

from .service import Service, execute

USER = {"email": "secret.person@example.com", "first_name": "Zebedee", "last_name": "Quux"}
PERSONAL = ("secret.person", "example.com", "Zebedee", "Quux", "127.0.0.1")


def events(service: Service, request_id: str) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in service.log().splitlines() if line.startswith("{")]
    return [line for line in lines if line.get("request_id") == request_id]


def test_a_request_is_one_line(service: Service) -> None:
    response = service.signup(json=USER, headers={"X-Request-ID": "req-1.a_B"})
    assert response.headers["X-Request-ID"] == "req-1.a_B"
    (event,) = events(service, "req-1.a_B")
    assert event.keys() == {
        *("time", "level", "message", "request_id", "method", "path", "status", "duration")
    }
    assert (event["method"], event["path"], event["status"]) == ("POST", "/signup", 201)
    assert isinstance(event["duration"], float)
    assert event["level"] == "info"


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, "é", '"}{"level":"x', "<script>"])
def test_an_id_that_is_not_sane_is_replaced(service: Service, given: str) -> None:
    response = service.get("/", headers={"X-Request-ID": given.encode()})
    made = response.headers["X-Request-ID"]
    assert made != given
    assert made.isalnum()
    assert len(events(service, made)) == 1


def test_nothing_personal_is_logged(service: Service, database_url: str) -> None:
    service.signup(json=USER)
    service.signup(json=USER | {"email": "secret.person(at)example.com"})
    service.signup(data=json.dumps(USER) + "}")
    service.signup("GET", params=USER)
    service.get("/secret.person@example.com/Zebedee")
    execute(database_url, "ALTER TABLE users RENAME COLUMN last_name TO family_name")
    try:
        assert service.signup(json=USER | {"email": "new." + USER["email"]}).status_code == 500
    finally:
        execute(database_url, "ALTER TABLE users RENAME COLUMN family_name TO last_name")
    log = service.log().partition("Booting")[2]
    assert 'column \\"last_name\\"' in log
    assert not [word for word in PERSONAL if word in log]
