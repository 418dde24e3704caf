"""The log: JSON, with the request's id, without personal data."""

import json
import os
import signal
from typing import Any

import requests

from testbed import wait_until
from testbed.database import Postgres, broken_table, execute
from testbed.service import USER, Service, project_copy

from .test_gunicorn import edit

PERSON = {"email": "secret.person@example.com", "first_name": "Zebedee", "last_name": "Quux"}
PERSONAL = ("secret.person", "example.com", "Zebedee", "Quux", "127.0.0.1", "Agent/7")


def events(service: Service) -> list[dict[str, Any]]:
    """Return every printed line except the start line, parsed as JSON."""
    lines = [x for x in service.log().splitlines() if not x.startswith("signup service on ")]
    assert not [line for line in lines if not line.startswith("{")]
    return [json.loads(line) for line in lines]


def test_responses_below_500_are_not_logged_by_default(service: Service) -> None:
    before = service.log()
    with requests.Session() as session:
        for body in (PERSON, PERSON, {}):
            service.signup(session=session, json=body)
        for path in ("/", "/metrics", "/healthz", "/readyz", "/nowhere") * 2:
            session.get(service.url + path, timeout=30)
    assert service.answers.keys() == {201, 400, 409}
    assert service.log() == before


def test_each_500_logs_the_request_and_its_cause(service: Service, database_url: str) -> None:
    with broken_table(database_url):
        for request_id in ("req-1.a_B", "req-2"):
            response = service.signup(json=PERSON, headers={"X-Request-ID": request_id})
            assert response.status_code == 500
            assert response.headers["X-Request-ID"] == request_id
    failed = [event for event in events(service) if event["message"] == "request failed"]
    assert [event.pop("request_id") for event in failed] == ["req-1.a_B", "req-2"]
    for event in failed:
        assert event.keys() == {"time", "level", "pid", "message", "path", "status"}
        assert (event["path"], event["status"]) == ("/signup", 500)
        assert event["level"].lower() == "error"
        assert event["pid"] in service.worker_pids()
    causes = [event for event in events(service) if event["message"].startswith("database: ")]
    assert causes[0]["message"].startswith('database: UndefinedColumn: column "last_name" of ')


def test_unexpected_exception_is_counted_and_logged_with_its_traceback(database_url: str) -> None:
    with project_copy() as project:
        edit(project / "signup/views.py", "user = database", "user = 1 / 0 or database")
        with Service(project=project, DATABASE_URL=database_url) as service:
            response = service.signup(json=USER | {"first_name": "Zebedee"})
            assert response.status_code == 500
            assert response.json() == {"error": "internal server error"}
            made = response.headers["X-Request-ID"]
            (failed,) = (e for e in events(service) if e.get("request_id") == made)
            assert "ZeroDivisionError: division by zero" in failed["traceback"]
            assert (failed["message"], failed["path"]) == ("request failed", "/signup")
            assert "Zebedee" not in service.log()
            service.check_equalities(rows=0)


def test_every_line_after_the_start_line_is_json(database_url: str) -> None:
    for how in (Service.press_ctrl_c, Service.stop):
        with Service(DATABASE_URL=database_url, WEB_CONCURRENCY="2") as service:
            service.wait_for(signup_workers=2)
            os.kill(service.worker_pids()[0], signal.SIGKILL)
            wait_until(lambda: service.boots() == 3)
            service.reload()
            service.wait_for(signup_workers=2)
            assert how(service) == 0
            lines = events(service)
            assert service.log().count("signup service on ") == 1
        messages = " ".join(line["message"] for line in lines)
        for part in ("Starting gunicorn", "Worker (pid", "Handling signal: hup", "Shutting down"):
            assert part in messages
        for line in lines:
            assert line.keys() == {"time", "level", "pid", "message"}


def test_personal_data_is_not_logged(database_url: str) -> None:
    """Of requests that the application answers; tests/test_hostile.py sends others."""
    with Service(DATABASE_URL=database_url, WEB_CONCURRENCY="2", LOG_LEVEL="debug") as service:
        service.wait_for(database_connections_max=25)
        start = len(service.log())
        service.signup(json=PERSON, headers={"User-Agent": "Agent/7"})
        service.signup(json=PERSON | {"email": "secret.person(at)example.com"})
        service.signup(data=json.dumps(PERSON) + "}")
        service.signup("GET", params=PERSON)
        service.get("/secret.person@example.com/Zebedee", auth=("secret.person", "Quux"))
        with broken_table(database_url):
            other = PERSON | {"email": "new." + PERSON["email"]}
            assert service.signup(json=other).status_code == 500
        service.stop()
        log = service.log()[start:]
        assert 'column \\"last_name\\"' in log
        assert not [line for line in log.splitlines() if any(word in line for word in PERSONAL)]


def test_postgresql_does_not_log_the_rows_of_failed_inserts(postgres: Postgres, url: str) -> None:
    start = len((postgres.server.data / "log").read_text())
    with Service(DATABASE_URL=url) as service:
        for rule in ("CHECK (last_name <> 'Quux')", "COLUMN required text NOT NULL"):
            execute(url, f"ALTER TABLE users ADD {rule}")
            assert service.signup(json=PERSON).status_code == 500
    log = (postgres.server.data / "log").read_text()[start:]
    assert "violates check constraint" in log
    assert "violates not-null constraint" in log
    assert not [line for line in log.splitlines() if any(word in line for word in PERSONAL)]
