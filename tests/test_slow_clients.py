"""Slow and stalled clients do not block other clients."""

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest

from testbed.service import Service, user

BODY = json.dumps(user("slow")).encode()
HEAD = b"POST /signup HTTP/1.1\r\nHost: x\r\n"
LENGTH = b"Content-Length: %d\r\n\r\n" % len(BODY)
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)


@contextlib.contextmanager
def clients(service: Service, count: int) -> Iterator[list[socket.socket]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(service.connect()) for _ in range(count)]


@pytest.mark.parametrize(
    "start",
    [
        b"P",
        HEAD,
        HEAD + LENGTH + BODY[:10],
        HEAD + CHUNKED[:60],
        HEAD + CHUNKED[:31],  # stops inside a chunk size
        HEAD + b"Content-Length: 999999\r\n\r\n{",  # refused at once; the client keeps sending
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nffffff\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",  # client side stays open
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" + HEAD,  # a complete request and a part of another
    ],
)
def test_slow_clients_do_not_block_others(service: Service, start: bytes) -> None:
    with clients(service, 100) as slow:  # on four workers
        for client in slow:
            client.sendall(start)
        for _ in range(20):
            assert service.get("/healthz").status_code == 200
            for client in slow:
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    client.send(b"x")


def test_request_sent_byte_by_byte_is_served(service: Service) -> None:
    with clients(service, 2) as slow:
        for client, rest, status in zip(
            slow, (LENGTH + BODY, CHUNKED), (b"201", b"409"), strict=True
        ):
            for byte in HEAD + rest:
                client.send(bytes([byte]))
                time.sleep(0.001)
            assert client.recv(100).split()[1] == status


def test_slow_reader_gets_every_response(service: Service) -> None:
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
