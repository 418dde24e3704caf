"""Clients that are slow, or never finish, do not keep others from signing up."""

import contextlib
import json
import re
import socket
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest

from signup.worker import Arrival, arrival

from .service import Service

USER = {"email": "ada@example.com", "first_name": "Ada", "last_name": "Lovelace"}
BODY = json.dumps(USER | {"email": "slow@example.com"}).encode()
HEAD = b"POST /signup HTTP/1.1\r\nHost: x\r\n"
LENGTH = b"Content-Length: %d\r\n\r\n" % len(BODY)
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)


@contextlib.contextmanager
def clients(service: Service, count: int) -> Iterator[list[socket.socket]]:
    address = urlsplit(service.url)
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(
                socket.create_connection((address.hostname, address.port), timeout=30)
            )
            for _ in range(count)
        ]


@pytest.mark.parametrize(
    "start",
    [
        b"P",
        HEAD,
        HEAD + LENGTH + BODY[:10],
        HEAD + CHUNKED[:60],
        HEAD + b"Content-Length: 999999\r\n\r\n{",  # refused at once; the client goes on and on
        b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",  # and never closes its side
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" + HEAD,  # a whole request, and a part of one
    ],
)
def test_others_are_served_meanwhile(service: Service, start: bytes) -> None:
    with clients(service, 100) as slow:  # four workers with eight threads each
        for client in slow:
            client.sendall(start)
        for _ in range(20):
            assert service.get("/healthz").status_code == 200
            for client in slow:
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    client.send(b"x")


def test_a_byte_at_a_time_gets_there(service: Service) -> None:
    with clients(service, 2) as slow:
        for client, rest, status in zip(
            slow, (LENGTH + BODY, CHUNKED), (b"201", b"409"), strict=True
        ):
            for byte in HEAD + rest:
                client.send(bytes([byte]))
                time.sleep(0.001)
            assert client.recv(100).split()[1] == status


def test_two_requests_at_once_get_two_answers(service: Service) -> None:
    request = (HEAD + LENGTH + BODY).replace(b"slow@", b"twos@")
    with clients(service, 1) as (client,):
        client.sendall(
            request + request + b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        )
        answers = client.makefile("rb").read()
        assert re.findall(rb"HTTP/1.1 (\d+)", answers) == [b"201", b"409", b"200"]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", Arrival.PARTIAL),
        (HEAD, Arrival.PARTIAL),
        (HEAD + b"\r\n", Arrival.WHOLE),
        (HEAD + LENGTH, Arrival.PARTIAL),
        (HEAD + LENGTH + BODY[:-1], Arrival.PARTIAL),
        (HEAD + LENGTH + BODY, Arrival.WHOLE),
        (HEAD + LENGTH + BODY + HEAD, Arrival.WHOLE),
        (HEAD + b"content-LENGTH:16385\r\n\r\n", Arrival.BODY_TOO_LARGE),
        (HEAD + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n", Arrival.BODY_TOO_LARGE),
        (HEAD + b"Content-Length: x\r\n\r\n", Arrival.WHOLE),
        (HEAD + CHUNKED, Arrival.WHOLE),
        (HEAD + CHUNKED[:-2] + b"Trailer: x\r\n\r\n", Arrival.WHOLE),
        (HEAD + CHUNKED[:-2] + b"Trailer: x\r\n", Arrival.PARTIAL),
        (HEAD + CHUNKED[:34], Arrival.PARTIAL),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", Arrival.WHOLE),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n4001\r\n", Arrival.BODY_TOO_LARGE),
        (HEAD + b"X: " + b"x" * 65536, Arrival.HEAD_TOO_LARGE),
    ],
)
def test_how_much_there_is_of_a_request(data: bytes, expected: Arrival) -> None:
    assert arrival(data, max_body=16384) is expected


@pytest.mark.parametrize("rest", [LENGTH + BODY, CHUNKED])
def test_every_beginning_of_a_request_is_a_part_of_it(rest: bytes) -> None:
    request = HEAD + rest
    for length in range(len(request)):
        assert arrival(request[:length], max_body=16384) is Arrival.PARTIAL
    assert arrival(request, max_body=16384) is Arrival.WHOLE


def test_answers_that_do_not_fit_at_once_get_there(service: Service) -> None:
    document, count = service.get("/openapi.json").content, 600
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(30)
        address = urlsplit(service.url)
        client.connect((address.hostname, address.port))
        client.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * count)
        client.shutdown(socket.SHUT_WR)
        received = b"".join(iter(lambda: client.recv(2**20), b""))
    assert received.count(b"HTTP/1.1 200 OK\r\n") == received.count(document) == count
