"""Slow and stalled clients do not block other clients."""

import contextlib
import json

import pytest

from testbed.service import Service, user

BODY = json.dumps(user("slow")).encode()
HEAD = b"POST /signup HTTP/1.1\r\nHost: x\r\n"
LENGTH = b"Content-Length: %d\r\n\r\n" % len(BODY)
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)


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
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(service.connect()) for _ in range(100)]  # on four workers
        for client in slow:
            client.sendall(start)
        for _ in range(20):
            assert service.get("/healthz").status_code == 200
            for client in slow:
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    client.send(b"x")
