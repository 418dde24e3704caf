"""nginx in front of two instances with two workers each."""

import contextlib
import http.client
import json
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests

from testbed import wait_until
from testbed.database import count_users, locked_table, stored_emails
from testbed.load import Signups
from testbed.nginx import LOG_ALL, Nginx
from testbed.programs import free_port
from testbed.service import USER, Service, user

pytestmark = pytest.mark.needs("nginx")
HOST = " HTTP/1.1\r\nHost: x\r\n"


@contextlib.contextmanager
def proxied(url: str, **options: Any) -> Iterator[Nginx]:
    """Run nginx and two services of two workers each; the second keeps its port at a restart."""
    env: dict[str, Any] = {"WEB_CONCURRENCY": "2", "METRICS_SAMPLE_INTERVAL": "0.05"}
    with (
        Service(DATABASE_URL=url, **env) as first,
        Service(DATABASE_URL=url, port=free_port(), **env) as second,
        Nginx(first, second, **options) as nginx,
    ):
        yield nginx


@pytest.fixture
def own(url: str) -> Iterator[Nginx]:
    """A separate stack for a test that counts requests or breaks an instance."""
    with proxied(url) as own:
        yield own


@pytest.fixture(scope="module")
def nginx(database_url: str) -> Iterator[Nginx]:
    with proxied(database_url) as shared:
        yield shared


def signups(service: Service) -> float:
    return service.metrics().total("signup_requests_total")


def raw(nginx: Nginx, request: str, source: str = "") -> tuple[int, http.client.HTTPMessage, bytes]:
    """Send `request` as is; return the status, headers and body of the response."""
    with nginx.connect(source) as client:
        client.sendall(request.encode())
        response = http.client.HTTPResponse(client)
        response.begin()
        return response.status, response.headers, response.read()


def test_signups_are_balanced_and_counted_exactly(own: Nginx, url: str) -> None:
    with Signups(own) as load:
        wait_until(lambda: own.answers.total() > 500)
    assert not load.unanswered
    assert set(own.answers) == {201, 400, 409}
    own.check_equalities(count_users(url))
    shares = [signups(service) / own.answers.total() for service in own.services]
    assert shares == pytest.approx([0.5, 0.5], abs=0.1)


def test_killing_or_stopping_an_instance_costs_at_most_one_request_per_client(
    own: Nginx, url: str
) -> None:
    second = own.services[1]
    clients = 8

    def more(count: int = 300) -> int:
        """Wait for `count` more responses; return how many requests were lost or got a 502."""
        goal = own.answers.total() + count
        wait_until(lambda: own.answers.total() > goal)
        return own.answers[502] + load.unanswered.total()

    with Signups(own, clients) as load:
        assert more() == 0
        second.kill()
        killed = more()
        assert killed <= clients  # each had one request in flight
        cut_short = load.unanswered.copy()  # lost after the head of the response
        with second:
            wait_until(lambda: signups(second) > 50)
            second.reload()
            assert more() == killed  # a reload loses no request
            assert second.stop() == 0
            # A listener that closes resets the connections in its queue. nginx can't know that
            # those requests were not executed, and avoids the instance for a while.
            assert more() <= killed + clients
    assert load.unanswered == cut_short
    assert set(own.answers) <= {201, 400, 409, 502}
    stored = stored_emails(url)
    assert stored >= set(load.acknowledged)


def test_signup_that_may_have_been_executed_is_not_retried(own: Nginx, url: str) -> None:
    def in_flight(service: Service) -> float:
        return service.metrics().get_value("signup_requests_in_flight")

    with ThreadPoolExecutor(1) as executor, locked_table(url):
        answer = executor.submit(own.signup, json=USER)
        wait_until(lambda: any(map(in_flight, own.services)))
        busy, other = sorted(own.services, key=in_flight, reverse=True)
        busy.kill()
        response = answer.result()
        assert response.status_code == 502
        assert "may have been executed" in response.json()["error"]
        assert signups(other) == 0
        assert in_flight(other) == 0
    # PostgreSQL completed the statement: a retry would have returned 409.
    wait_until(lambda: count_users(url) == 1)
    assert own.signup(json=USER).status_code == 409


def test_no_running_instance_returns_502(own: Nginx) -> None:
    for service in own.services:
        service.stop()
    for _ in range(4):
        response = own.signup(json=USER)
        assert response.status_code == 502
        assert set(response.json()) == {"error"}
        assert response.headers["X-Request-ID"]


def test_rate_limit_applies_per_client(own: Nginx, url: str) -> None:
    started = time.monotonic()

    def signup(number: int) -> requests.Response:
        return own.signup(json=user(f"{number}"), address="127.0.0.9")

    def page(number: int) -> int:
        return raw(own, f"GET /{('', 'healthz')[number % 2]}{HOST}\r\n", "127.0.0.9")[0]

    with ThreadPoolExecutor(20) as executor:
        answers = list(executor.map(signup, range(200)))
        pages = Counter(executor.map(page, range(200)))
    passed = sum(answer.status_code == 201 for answer in answers)
    for count in (passed, pages[200]):  # each has its own limit
        assert 21 <= count <= 21 + 10 * (time.monotonic() - started)
    assert pages[200] + pages[429] == 200 > pages[200]
    refused = [answer for answer in answers if answer.status_code == 429]
    assert len(refused) == 200 - passed > 0
    for answer in refused:
        assert answer.json() == {"error": "too many requests, retry later"}
        assert answer.headers["Content-Type"] == "application/json"
        assert answer.headers["Retry-After"] == "1"
    assert own.signup(json=USER).status_code == 201  # from another address
    wait_until(lambda: own.signup(json=USER, address="127.0.0.9").status_code == 409)
    assert sum(map(signups, own.services)) == own.answers.total() - own.answers[429]
    assert count_users(url) == passed + 1


@pytest.mark.parametrize("path", ["/metrics", "/readyz", "/openapi.json", "/stub_status"])
def test_internal_endpoints_are_not_reachable(nginx: Nginx, path: str) -> None:
    name = path[1:]
    for target in (
        *(path, f"{path}/", f"{path}?a=b", f"{path}#a", f"/{path}", f"//{path}", f"{path};a=b"),
        *(f"/.{path}", f"/x/..{path}", f"/signup/..{path}", f"/x/%2e%2e{path}", f"/..{path}"),
        *(f"/%{ord(name[0]):x}{name[1:]}", f"/%2f{name}", f"/x/..%2f{name}", f"/%5c..%5c{name}"),
        *(f"/signup{path}", f"/signup/{path}", f"/healthz/..{path}", f"/healthz{path}"),
        *(f"{path}%00", f"{path}%20", f"{path}%0a", f"{path}%3f", f"/signup?/..{path}#{path}"),
        *(f"http://server:3000{path}", f"HTTP://x{path}", path.upper(), f"/\\..\\{name}"),
    ):
        for version in ("HTTP/1.1\r\nHost: server:3000", "HTTP/1.0"):
            status, headers, body = raw(
                nginx, f"GET {target} {version}\r\nConnection: close\r\n\r\n"
            )
            assert (status in (400, 404)) or target.startswith("/signup?"), target
            assert headers["Content-Type"] == "application/json"
            assert set(json.loads(body)) == {"error"}, target


def test_contract_is_the_same_through_the_proxy(nginx: Nginx) -> None:
    assert nginx.get("/").json() == {"message": "welcome"}
    assert nginx.get("/healthz").json() == {"status": "ok"}
    assert nginx.signup(json=USER).status_code == 201
    assert nginx.signup(json=USER).json() == {"error": "email already exists"}
    assert {nginx.signup(method).status_code for method in ("HEAD", "PUT", "OPTIONS")} == {405}
    for data in (b"x" * 16385, iter([b"x" * 9000] * 2)):
        answer = nginx.signup(data=data)
        assert answer.status_code == 413
        assert answer.json() == {"error": "request body too large"}
    assert nginx.signup(data=b"x" * 16384).json() == {"error": "invalid request body"}
    assert nginx.get("/elsewhere").json() == {"error": "not found"}


GZIP = f"POST /signup{HOST}Transfer-Encoding: gzip"
METHODS = ("GET", "DELETE", "A", "A" * 30)
PAGES, WELCOME = "GET, HEAD, OPTIONS", {"message": "welcome"}


@pytest.mark.parametrize(
    ("request_text", "status", "error", "allow"),
    [
        *((text, 400, "bad request", None) for text in ("nonsense", "GET / HTTP/1.1")),
        (f"GET /{HOST}Content-Length: x", 400, "bad request", None),
        (f"GET /{'x' * 9000}{HOST}", 414, "request URI too long", None),
        (f"GET /{HOST}X: {'x' * 9000}", 431, "request headers too large", None),
        (f"TRACE /{HOST}", 405, "method not allowed", PAGES),
        (f"TRACE /signup{HOST}", 405, "method not allowed", "POST"),
        (GZIP, 501, "not implemented", None),
        ("GET / HTTP/3.0\r\nHost: x", 505, "HTTP version not supported", None),
        # gunicorn would refuse these in HTML, if nginx passed on what the service doesn't use.
        (f"GET /?{'x' * 5000}{HOST}", 200, None, None),
        (f"GET /?\u00e9{HOST}", 200, None, None),
        (f"GET /{HOST}" + "X: x\r\n" * 105, 200, None, None),
        (f"GET /{HOST}X: {'x' * 8182}", 200, None, None),
        (f"GET /{HOST}Content-Type: a\r\nContent-Type: b", 200, None, None),
        (f"GET /{HOST}X: \x01\r\nExpect: x\r\nUpgrade: h2c", 200, None, None),
        *((f"{word} /signup{HOST}", 405, "method not allowed", "POST") for word in METHODS),
    ],
)
def test_any_request_gets_json_and_an_id(
    nginx: Nginx, request_text: str, status: int, error: str | None, allow: str | None
) -> None:
    got, headers, body = raw(nginx, request_text.strip() + "\r\nConnection: close\r\n\r\n")
    assert (got, json.loads(body)) == (status, {"error": error} if error else WELCOME)
    assert headers["Content-Type"] == "application/json"
    assert headers["X-Request-ID"]
    assert headers["Allow"] == allow


def test_request_id_is_kept_and_forwarded_headers_are_dropped(nginx: Nginx) -> None:
    answer = nginx.signup(json=USER, headers={"X-Request-ID": "mine-1"})
    assert answer.headers["X-Request-ID"] == "mine-1"
    for bad in ("a b", "x" * 129, "a@b"):
        given = nginx.signup(headers={"X-Request-ID": bad}).headers["X-Request-ID"]
        assert len(given) == 32
        # nginx logs a request only after its response.
        wait_until(lambda: f'"request_id": "{given}"' in nginx.log())


def test_access_log_is_json_without_personal_data(url: str) -> None:
    query = "?email=ada@example.com"
    agent = {"User-Agent": "agent-7", "Referer": "http://example.org/7"}
    with proxied(url, edits=LOG_ALL) as own:
        answer = own.signup(json=USER, params=USER, headers=agent)
        for line in (
            f"GET /ada@example.com{query}{HOST}",
            f"ADA /signup{query}{HOST}",
            "ada@a\r\n",
        ):
            raw(own, f"{line}\r\n")
        wait_until(lambda: own.log().count("\n") == 4)
        log = own.log()
    lines = [json.loads(line) for line in log.splitlines()]
    # nginx has two worker processes, so the order may differ.
    assert {(line["method"], line["path"], line["status"]) for line in lines} == {
        ("POST", "/signup", 201),
        ("GET", "other", 404),
        ("OTHER", "/signup", 405),
        ("OTHER", "other", 400),
    }
    (line,) = (line for line in lines if line["status"] == 201)
    assert line["request_id"] == answer.headers["X-Request-ID"]
    assert line["upstream_status"] == "201"
    assert line["duration"] >= 0
    assert float(line["upstream_duration"]) >= 0
    for secret in ("ada@", "Ada", "example", "agent-7", "127.1."):
        assert secret not in log


def test_requests_that_reach_no_replica_cannot_fill_the_log(own: Nginx) -> None:
    for text in (f"GET /elsewhere{HOST}\r\n", "nonsense\r\n\r\n", f"{GZIP}\r\n\r\n"):
        for _ in range(150):
            assert raw(own, text)[0] in (400, 404, 501)
    sent = {own.signup(json=user(f"{n}")).headers["X-Request-ID"] for n in range(20)}

    def logged() -> set[str]:
        return {json.loads(line)["request_id"] for line in own.log().splitlines()}

    wait_until(lambda: sent <= logged())
    assert len(logged() - sent) < 45  # about 1 % of 450
