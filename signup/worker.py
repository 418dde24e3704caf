"""gunicorn's threaded worker, made fair to the other clients of a slow one.

gthread gives a connection a thread as soon as its first byte is there: as many clients as there
are threads, each sending a byte a second, and nobody else is served. And its event loop waits up
to two seconds for each peer that is slow to close. Here a request gets a thread once all of it
has arrived, and what comes before and after waits in the event loop, where it costs nothing.
"""

import contextlib
import io
import re
import select
import socket
import sys
from collections.abc import Callable
from concurrent.futures import Future
from enum import Enum
from functools import partial
from selectors import EVENT_READ
from time import monotonic
from typing import Any

from gunicorn import util
from gunicorn.http.errors import ParseException
from gunicorn.workers.gthread import STOP_KEEPALIVE_LINGER, ThreadWorker
from werkzeug.exceptions import RequestEntityTooLarge

from .config import Config

RECEIVE_TIMEOUT = 30.0  # seconds for a request to arrive; the connection is closed after that
CLOSE_TIMEOUT = 2.0  # seconds for the peer to close; to be first could reset the answer away
MAX_HEAD = 65536  # bytes of request line and headers; twice what nginx lets through
MAX_CHUNKS = 1024  # of a body; they are counted anew whenever some of it arrives

CONTENT_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d+)[ \t]*\r\n", re.IGNORECASE)
EXPECTS = re.compile(rb"\r\nexpect:[ \t]*100-continue[ \t]*\r\n", re.IGNORECASE)
BARE_LF = re.compile(rb"(?<!\r)\n")
CHUNKED = re.compile(rb"\r\ntransfer-encoding:", re.IGNORECASE)
CHUNK_SIZE = re.compile(rb"([0-9a-f]{1,8})[^\r\n]*\r\n", re.IGNORECASE)


class Arrival(Enum):
    """How much there is of a request."""

    PARTIAL = "some of it"
    WHOLE = "all of it, or something that no rest would make a request"
    HEAD_TOO_LARGE = "more headers than are taken"
    BODY_TOO_LARGE = "more of a body than is taken, or the announcement of it"


def arrival(data: bytes, max_body: int) -> Arrival:
    """How much `data` holds of the HTTP/1.1 request that it starts with (RFC 9112).

    It decides no more than when to wait: a thread sees what is there, and then an end.
    """
    end = data.find(b"\r\n\r\n")
    if end < 0:
        if len(data) > MAX_HEAD:
            return Arrival.HEAD_TOO_LARGE
        return Arrival.WHOLE if BARE_LF.search(data) else Arrival.PARTIAL
    if len(data) > 2 * (MAX_HEAD + max_body):  # a chunk may have an extension of any length
        return Arrival.BODY_TOO_LARGE
    head, body = data[: end + 2], end + 4
    if CHUNKED.search(head):
        return _chunks(data, body, max_body)
    length = CONTENT_LENGTH.search(head)
    if length is None:
        return Arrival.WHOLE
    if len(length[1]) > 9 or int(length[1]) > max_body:
        return Arrival.BODY_TOO_LARGE
    return Arrival.WHOLE if len(data) - body >= int(length[1]) else Arrival.PARTIAL


def _chunks(data: bytes, position: int, max_body: int) -> Arrival:
    total = 0
    for _ in range(MAX_CHUNKS):
        if position >= len(data):
            return Arrival.PARTIAL
        line = CHUNK_SIZE.match(data, position)
        if line is None:
            return Arrival.WHOLE if b"\n" in data[position:] else Arrival.PARTIAL
        size = int(line[1], 16)
        if size == 0:  # trailers, if any, then an empty line
            ended = data.find(b"\r\n\r\n", line.end() - 2) >= 0
            return Arrival.WHOLE if ended else Arrival.PARTIAL
        total += size
        if total > max_body:
            return Arrival.BODY_TOO_LARGE
        position = line.end() + size + 2
        if not b"\r\n".startswith(data[position - 2 : position]):
            return Arrival.WHOLE
    return Arrival.BODY_TOO_LARGE


class Worker(ThreadWorker):
    """A thread for each request, not for each connection."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._max_body = Config.from_env().max_body_bytes
        self.retire: Callable[[], None] = lambda: None  # called when the worker starts to stop

    @classmethod
    def check_config(cls, cfg: Any, log: Any) -> None:
        """At the start: refuse TLS, whose handshake would wait in the event loop."""
        if cfg.is_ssl:
            sys.exit("certfile, keyfile: the service speaks plain HTTP; TLS belongs to the proxy")

    def enqueue_req(self, conn: Any) -> None:
        """In the event loop: `conn` is new, is readable, or has read ahead."""
        if not conn.initialized:
            conn.init()
            conn.closing = False
            conn.deadline = None
            # Whatever `arrival` says, no thread waits for a client: where nothing is left to read,
            # it reads an end, and the parser makes an error of that.
            conn.parser.unreader.chunk = lambda size_hint=None: b""
        received = self._receive(conn)
        if received == b"" and (conn.closing or not conn.parser.unreader.buf.tell()):
            self._close(conn)
        elif conn.closing:
            self._wait(conn, CLOSE_TIMEOUT)
        else:
            data = conn.parser.unreader.buf.getvalue()
            conn.arrival = arrival(data, self._max_body)
            if conn.arrival is Arrival.BODY_TOO_LARGE:
                conn.parser.unreader.chunk = _too_large
            if conn.arrival is Arrival.PARTIAL and received != b"":
                if _asks(data):
                    with contextlib.suppress(OSError):
                        conn.sock.send(b"HTTP/1.1 100 Continue\r\n\r\n")
                self._wait(conn, RECEIVE_TIMEOUT)
            else:
                conn.deadline = None
                super().enqueue_req(conn)

    def handle(self, conn: Any) -> Any:
        """In a thread: answer the request that has arrived."""
        if conn.arrival is Arrival.HEAD_TOO_LARGE:
            conn.sock.setblocking(True)
            util.write_error(conn.sock, 431, "Request Header Fields Too Large", "")
            return False
        return super().handle(conn)

    def handle_request(self, req: Any, conn: Any) -> Any:
        req._expected_100_continue = False  # the body is here, or is not wanted
        return super().handle_request(req, conn)

    def finish_request(self, conn: Any, future: "Future[Any]") -> None:
        """In the event loop: keep the connection, or end it as RFC 9112, section 9.6, says."""
        if not future.cancelled() and future.exception() is None and future.result():
            super().finish_request(conn, future)
            return
        try:
            conn.sock.shutdown(socket.SHUT_WR)
        except OSError:
            self._close(conn)
        else:
            conn.closing = True
            self.enqueue_req(conn)

    def _keepalive_after(self, conn: Any, keepalive: bool) -> bool:
        # What is left of a request that did not come as a whole must not pass for the next one.
        whole = conn.arrival is Arrival.WHOLE
        try:
            return whole and bool(super()._keepalive_after(conn, keepalive))
        except ParseException:  # in a body that nobody read; the answer to it has been sent
            return False

    def _cap_keepalive(self, deadline: float) -> None:
        # The worker stops: what has not arrived by `deadline` will not be waited for either.
        self.retire()
        self._stop_listening()
        super()._cap_keepalive(deadline)
        for conn in self.pending_conns:
            conn.timeout = min(conn.timeout, deadline)

    def _stop_listening(self) -> None:
        # The kernel has connections that nobody has accepted, maybe with a request in them: when
        # the last worker of a service closes its listener, they are reset. So they are accepted
        # first, and who connects later is refused at once, and knows that nothing was executed.
        for listener in self.sockets:
            poller = select.poll()
            poller.register(listener, select.POLLIN)
            while poller.poll(0):
                self.accept(listener)
            listener.close()

    def _receive(self, conn: Any) -> bytes | None:
        """What has come since, which is also in the parser's buffer; None: nothing, b"": an end."""
        buffer = conn.parser.unreader.buf
        buffer.seek(0, io.SEEK_END)
        conn.sock.setblocking(False)
        try:
            received: bytes = conn.sock.recv(65536)
        except BlockingIOError:
            return None
        except OSError:
            return b""
        if not conn.closing:
            buffer.write(received)
        return received

    def _wait(self, conn: Any, seconds: float) -> None:
        if conn.deadline is None:
            conn.deadline = monotonic() + (seconds if self.alive else STOP_KEEPALIVE_LINGER)
        conn.timeout = conn.deadline
        self.pending_conns.append(conn)
        readable = partial(self.on_pending_socket_readable, conn)
        self.poller.register(conn.sock, EVENT_READ, readable)

    def _close(self, conn: Any) -> None:
        self.nr_conns -= 1
        conn.close()


def _asks(data: bytes) -> bool:
    # Whether the client waits for 100 Continue (RFC 9110, section 10.1.1). gunicorn sends it once
    # a thread has the request, and that has to wait for the body here.
    head = data.find(b"\r\n\r\n") == len(data) - 4
    return head and b" HTTP/1.1" in data.partition(b"\r\n")[0] and bool(EXPECTS.search(data))


def _too_large(size_hint: int | None = None) -> bytes:
    # Who reads on where a body is not waited for answers 413, however much has come by chance.
    raise RequestEntityTooLarge
