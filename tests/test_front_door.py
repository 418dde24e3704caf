"""nginx against hostile clients, behind a load balancer, and with https."""

import json
import resource
import signal
import ssl
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress

import pytest
import requests

from testbed import wait_until
from testbed.load import Signups
from testbed.nginx import LOG_ALL, Nginx, certify
from testbed.service import Service, user

pytestmark = pytest.mark.needs("nginx", "openssl")
HEAD = b"POST /signup HTTP/1.1\r\nHost: x\r\nContent-Length: 16000\r\n"
PAGE = b"GET /elsewhere HTTP/1.1\r\nHost: x\r\n\r\n"
# The lines of real_ip.conf without their comment signs, for a balancer at 127.0.0.2.
BALANCER = {f"# {name}": name for name in ("set_real_ip_from", "real_ip_header", "real_ip_rec")}
BALANCER |= {"10.0.0.0/16": "127.0.0.2"}


@pytest.fixture(scope="module")
def https(service: Service) -> Iterator[Nginx]:
    with Nginx(service, entry="https.conf", edits=LOG_ALL) as https:
        yield https


@pytest.mark.parametrize(
    ("start", "port"),
    [(HEAD + b"\r\n{", 8080), (HEAD, 8080), (b"\x16\x03\x01\x02\x00\x01\x00", 8443)],
    ids=["bodies", "heads", "handshakes"],
)
def test_one_client_with_2400_connections_shuts_nobody_out(
    https: Nginx, start: bytes, port: int
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4000)), hard))
    with ExitStack() as stack:
        for _ in range(2400):
            stack.enter_context(https.connect("127.9.9.9", port)).sendall(start)
        for number in range(20):
            answer = https.signup(json=user(f"{len(start)}-{number}"))
            assert answer.status_code == 201


def test_one_client_has_at_most_200_requests_in_progress(service: Service) -> None:
    edits = LOG_ALL | {"burst=20": "burst=300"}
    with Nginx(service, edits=edits) as nginx, ExitStack() as held:
        for _ in range(250):
            held.enter_context(nginx.connect()).sendall(HEAD + b"\r\n{")
        wait_until(lambda: nginx.log().count('"status": 429') == 50)


def test_no_free_connection_is_a_503_without_personal_data(service: Service) -> None:
    few = {"worker_connections 8192": "worker_connections 16", "processes 2": "processes 1"}
    with Nginx(service, edits=few) as nginx, ExitStack() as held:

        def responds() -> bool:
            with suppress(OSError), nginx.connect() as client:
                client.sendall(PAGE)
                return client.recv(12) == b"HTTP/1.1 404"
            return False

        while responds():
            last = held.enter_context(nginx.connect())
            last.sendall(HEAD)
        last.close()
        wait_until(responds)  # one connection is free, and none to a replica
        answer = nginx.signup(params={"email": "ada@example.com"})
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
        assert answer.json() == {"error": "service is busy, retry later"}
        held.close()
        wait_until(lambda: nginx.signup(json=user("slot")).status_code == 201)
        assert "client: " not in nginx.log()


def limited(nginx: Nginx, forwarded: str, address: str = "127.0.0.2") -> bool:
    """Send 200 signups, with their number in X-Forwarded-For; return whether any got a 429."""

    def signup(number: int) -> int:
        lies = {"X-Forwarded-For": forwarded.format(number), "X-Real-IP": f"192.0.2.{number}"}
        return nginx.signup(address=address, headers=lies).status_code

    with ThreadPoolExecutor(20) as executor:
        return 429 in executor.map(signup, range(200))


def test_clients_have_their_own_limits_and_cannot_choose_their_address(service: Service) -> None:
    with Nginx(service) as nginx:
        assert limited(nginx, "203.0.113.{}")
    with Nginx(service, edits=BALANCER) as nginx:
        assert not limited(nginx, "10.9.8.7, 203.0.113.{}")
        assert limited(nginx, "198.51.100.{}, 192.0.2.1, 127.0.0.2")  # two balancers in a row
        assert limited(nginx, "2001:db8::{}")  # one client has all addresses of a /64
        assert not limited(nginx, "2001:db8:1:{}::1")
        assert not limited(nginx, "::ffff:192.0.2.{}")  # IPv4
        assert limited(nginx, "198.51.100.{}", address="127.0.0.3")  # not the balancer


def tls(nginx: Nginx, newest: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> ssl.SSLSocket:
    context = ssl.create_default_context(cafile=str(nginx.folder / "trusted.pem"))
    context.set_alpn_protocols(["h2", "http/1.1"])
    context.set_ciphers("DEFAULT@SECLEVEL=0")  # else this side would refuse TLS 1.1
    context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
    context.maximum_version = newest
    return context.wrap_socket(nginx.connect(port=8443), server_hostname="127.0.0.1")


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
def test_https_offers_http_2_and_tls_1_2_or_newer(https: Nginx) -> None:
    for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
        with tls(https, version) as client:
            assert client.selected_alpn_protocol() == "h2"
    with pytest.raises(ssl.SSLError, match="ALERT_PROTOCOL_VERSION"):
        tls(https, ssl.TLSVersion.TLSv1_1)


def frame(kind: int, flags: int, payload: bytes, stream: int = 1) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags, 0, 0, 0, stream]) + payload


H2_START = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, b"", stream=0)
# HPACK: POST, https, then literal values of :path and :authority.
H2_HEAD = b"\x83\x87\x04\x07/signup\x01\x01x"


def test_signup_over_http_2(https: Nginx) -> None:
    with tls(https) as client:
        body = json.dumps(user("http2")).encode()
        client.sendall(H2_START + frame(1, 4, H2_HEAD) + frame(0, 1, body))
        received = b""
        while b"}}" not in received:
            received += client.recv(65536)
    assert b"user created successfully" in received
    assert b"\0\x03\0\0\0\x08" in received  # at most 8 requests at a time, as each holds memory


def test_errors_end_pipelines_and_are_json_in_http_2(https: Nginx) -> None:
    with https.connect() as client, client.makefile("rb") as stream:
        client.sendall(PAGE * 100)
        assert stream.read().count(b"HTTP/1.1 404") == 1
    head = H2_HEAD + b"\x0f\x0d\x0520000"  # content-length
    long = head + b"\0\x01x\x7f\xc1\xb7\x02" + b"x" * 40_000
    with tls(https) as client:
        client.sendall(H2_START + frame(1, 4, head) + frame(0, 0, b" " * 10_000) * 2)
        received = b""
        while b"}" not in received:
            received += client.recv(65536)
    assert b"413" in received
    assert b'{"error": "request body too large"}' in received
    logged = https.log().count("\n")
    with tls(https) as client:
        client.sendall(H2_START + frame(1, 0, long[:16_000]))
        client.sendall(frame(9, 0, long[16_000:32_000]) + frame(9, 4, long[32_000:]))
        wait_until(lambda: https.log().count("\n") > logged)
    assert all(isinstance(json.loads(line)["status"], int) for line in https.log().splitlines())


def test_http_is_redirected_and_only_https_has_hsts(https: Nginx) -> None:
    trusted = str(https.folder / "trusted.pem")
    for path, status in (("/", 200), ("/elsewhere", 404)):
        url = f"https://127.0.0.1:{https.ports[8443]}{path}"
        answer = requests.get(url, verify=trusted, timeout=30)
        assert answer.status_code == status
        assert answer.headers["Strict-Transport-Security"] == "max-age=31536000"
        assert "Strict-Transport-Security" not in https.get(path).headers
    for port in (8081, 8443):
        url = f"http://127.0.0.1:{https.ports[port]}"
        answer = requests.post(url + "/signup?a=b", allow_redirects=False, timeout=30)
        assert answer.status_code == 308  # a POST stays a POST
        assert answer.headers["Location"] == "https://127.0.0.1/signup?a=b"
        assert answer.json() == {"error": "use https"}
    token = https.folder / "acme/.well-known/acme-challenge/token"
    token.parent.mkdir(parents=True)
    token.write_text("token.key")
    url = f"http://127.0.0.1:{https.ports[8081]}/.well-known/acme-challenge/"
    assert requests.get(url + "token", timeout=30).text == "token.key"
    assert requests.get(url + "other", timeout=30).json() == {"error": "not found"}


def test_reload_with_a_new_certificate_loses_no_request(service: Service) -> None:
    with Nginx(service, entry="https.conf") as nginx:
        address = ("127.0.0.1", nginx.ports[8443])
        nginx.url = f"https://127.0.0.1:{nginx.ports[8443]}"
        with Signups(nginx, 4) as load:
            wait_until(lambda: load.acknowledged)
            certify(nginx.folder)
            nginx.send_signal(signal.SIGHUP)
            new = (nginx.folder / "tls/fullchain.pem").read_text()
            wait_until(lambda: ssl.get_server_certificate(address) == new)
            goal = len(load.acknowledged) + 50
            wait_until(lambda: len(load.acknowledged) > goal)
        assert not load.unanswered
