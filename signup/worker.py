"""gunicorn's gevent worker, fair to the clients of others and to other workers, gentle at its end.

A connection has a greenlet, which waits until all of a request has arrived, and only then takes one
of the worker's WEB_THREADS turns: who sends a byte a second costs the others nothing. gunicorn's
own drops connections that nobody has accepted yet when it stops, and closes others without waiting
for the peer, which may reset the answer away. It sends an answer in two pieces, and lets the worker
that is first accept a crowd of connections (docs/performance.md).
"""

import contextlib
import errno
import functools
import io
import mmap
import re
import signal
import socket
import sys
from collections.abc import Callable
from enum import Enum
from time import monotonic, time
from typing import Any

import gevent
from gevent.lock import BoundedSemaphore
from gevent.pool import Pool
from gevent.socket import wait_read
from gunicorn import util
from gunicorn.http import get_parser, wsgi
from gunicorn.http.errors import NoMoreData, ParseException
from gunicorn.workers.ggevent import GeventWorker
from werkzeug.exceptions import RequestEntityTooLarge

from .config import Config

RECEIVE_TIMEOUT = 30.0  # seconds for a request to arrive; the connection is closed after that
SEND_TIMEOUT = 30.0  # seconds for the peer to take some more of an answer
CLOSE_TIMEOUT = 2.0  # seconds for the peer to close; to be first could reset the answer away
STOP_TIMEOUT = 2.0  # seconds for a request to arrive while the worker stops
MAX_HEAD = 65536  # bytes of request line and headers; twice what nginx lets through
MAX_CHUNKS = 1024  # of a body; they are counted anew whenever some of it arrives

CONTENT_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d+)[ \t]*\r\n", re.IGNORECASE)
EXPECTS = re.compile(rb"\r\nexpect:[ \t]*100-continue[ \t]*\r\n", re.IGNORECASE)
BARE_LF = re.compile(rb"(?<!\r)\n")
CHUNKED = re.compile(rb"\r\ntransfer-encoding:", re.IGNORECASE)
CHUNK_SIZE = re.compile(rb"([0-9a-f]{1,8})[^\r\n]*\r\n", re.IGNORECASE)

GONE = {errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN}

# By slot, one more than the connections of its worker; 0: there is none, or it stops. The memory is
# the master's and all its workers'.
loads = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("i")
AHEAD = 2  # connections; a worker that has more than these more than another lets others go first
COURTESY = 0.005  # seconds for them to do so
AT_ONCE = 4  # connections accepted before those that are there have their turn


class Arrival(Enum):
    """How much there is of a request."""

    PARTIAL = "some of it"
    WHOLE = "all of it, or something that no rest would make a request"
    HEAD_TOO_LARGE = "more headers than are taken"
    BODY_TOO_LARGE = "more of a body than is taken, or the announcement of it"


def arrival(data: bytes, max_body: int) -> Arrival:
    """How much `data` holds of the HTTP/1.1 request that it starts with (RFC 9112).

    It decides no more than when to wait: the parser sees what is there, and then an end.
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


class Worker(GeventWorker):
    """A greenlet for each connection, and a turn for each request."""

    alive: bool
    slot: int  # set by gunicorn.conf.py

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._max_body = Config.from_env().max_body_bytes
        self._connections = Pool(self.worker_connections)
        self._open = 0  # connections; the pool has some that have ended
        self._waiting: set[Any] = set()  # connections whose next request has not arrived
        self.retire: Callable[[], None] = lambda: None  # called when the worker starts to stop

    @classmethod
    def check_config(cls, cfg: Any, log: Any) -> None:
        """At the start: refuse TLS, which this worker does not speak."""
        if cfg.is_ssl:
            sys.exit("certfile, keyfile: the service speaks plain HTTP; TLS belongs to the proxy")

    def handle_quit(self, sig: int, frame: Any) -> None:
        """End at once; but Ctrl-C reaches every process of the terminal, and the master asks."""
        if sig != signal.SIGINT:
            super().handle_quit(sig, frame)

    def run(self) -> None:
        """Serve for as long as the worker is wanted; then answer what has arrived, and end."""
        # gunicorn computes a setting at each look, of which a request takes thirty, and makes the
        # stream for an application's errors anew for each request.
        self.cfg.__dict__.update({name: each.get() for name, each in self.cfg.settings.items()})
        environ = wsgi.base_environ(self.cfg)
        wsgi.base_environ = lambda _: environ.copy()
        self._turns = BoundedSemaphore(self.cfg.threads)
        for listener in self.sockets:
            listener.settimeout(0)  # another worker may have taken what was announced
        self._count(0)
        accepting = [gevent.spawn(self._serve, listener) for listener in self.sockets]
        while self.alive:
            self.notify()
            gevent.sleep(0.2)
        self.retire()
        loads[self.slot] = 0
        gevent.spawn_later(STOP_TIMEOUT, self._hang_up)
        gevent.killall(accepting)
        # The kernel has connections that nobody has accepted, maybe with a request in them: when
        # the last worker of a service closes its listener, they are reset. So they are accepted
        # first, and who connects later is refused at once, and knows that nothing was executed.
        for listener in self.sockets:
            with contextlib.suppress(OSError):
                while self._accept(listener):
                    pass
            listener.close()
        give_up = monotonic() + self.cfg.graceful_timeout
        while self._connections and monotonic() < give_up:
            self.notify()
            self._connections.join(timeout=0.2)

    def _serve(self, listener: Any) -> None:
        while True:
            self._connections.wait_available()
            wait_read(listener.fileno())
            # All workers are woken, and who is first would have all of a crowd, to answer them
            # one by one while the others idle.
            ahead = self._is_ahead()
            if ahead:
                gevent.sleep(COURTESY)
            try:
                for _ in range(AT_ONCE):
                    if self._connections.full() or not self._accept(listener):
                        break
                    if not ahead and self._is_ahead():
                        break
            except OSError:  # too many open files, for one
                self.log.exception("Socket error accepting a connection.")
                gevent.sleep(1)

    def _accept(self, listener: Any) -> bool:
        """Accept a connection and serve it; whether there was one."""
        try:
            client, addr = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return False
        self._connections.spawn(self.handle, listener.getsockname(), client, addr)
        self._count(+1)
        return True

    def _is_ahead(self) -> bool:
        return loads[self.slot] > min(filter(None, loads), default=0) + AHEAD

    def _count(self, change: int) -> None:
        self._open += change
        if self.alive:
            loads[self.slot] = self._open + 1

    def handle(self, listener: Any, client: Any, addr: Any) -> None:
        """All of a connection, in its greenlet; `listener` and `addr` are the two addresses."""
        try:
            self._converse(listener, client, addr)
        except TimeoutError:  # the peer takes no answer
            pass
        except OSError as error:
            if error.errno not in GONE:
                self.log.exception("Socket error processing request.")
        finally:
            _close(client)
            self._count(-1)

    def _converse(self, listener: Any, client: Any, addr: Any) -> None:
        parser = get_parser(self.cfg, client, addr)
        while True:
            state = self._receive(client, parser.unreader)
            if state is None:
                return
            client.settimeout(SEND_TIMEOUT)
            if state is Arrival.HEAD_TOO_LARGE:
                util.write_error(client, 431, "Request Header Fields Too Large", "")
                return
            # Whatever `arrival` says, nobody waits for the client any more: where nothing is left
            # to read, the parser reads an end, and makes an error of that.
            parser.unreader.chunk = _too_large if state is Arrival.BODY_TOO_LARGE else _nothing
            request = None
            try:
                request = next(parser)
                request._expected_100_continue = False  # the body is here, or is not wanted
                with self._turns:
                    # What is left of a request that did not come as a whole is not the next one.
                    last = state is not Arrival.WHOLE
                    stays = self._answer(listener, request, client, addr, last)
                if not stays or not parser.finish_body():
                    return
                parser.mesg = None  # or it would look for more of this request again
            except (NoMoreData, StopIteration):
                return
            except OSError:
                raise
            except Exception as error:
                # Where nobody has read a body, its errors are seen once the answer is sent.
                if request is None or not isinstance(error, ParseException):
                    self.handle_error(request, client, addr, error)
                return

    def _answer(self, listener: Any, request: Any, client: Any, addr: Any, last: bool) -> bool:
        """Have the application answer; whether the connection stays open.

        As gunicorn's handle_request, less its access log and its hooks for a request.
        """
        response, environ = wsgi.create(request, client, addr, listener, self.cfg, Response)
        self.nr += 1
        if self.nr >= self.max_requests and self.alive:
            self.log.info("Autorestarting worker after current request.")
            self.alive = False
        if last or not self.alive:
            response.force_close()
        parts = self.wsgi(environ, response.start_response)
        try:
            body = b"".join(parts)
        finally:
            if hasattr(parts, "close"):
                parts.close()
        response.send(body)
        return not response.should_close()

    def _receive(self, client: Any, unreader: Any) -> Arrival | None:
        """Wait for the next request in the parser's buffer; None: there is none to answer."""
        deadline = monotonic() + self._patience(self.cfg.keepalive)
        begun = False
        self._waiting.add(client)
        try:
            while True:
                data = unreader.buf.getvalue()
                if data:
                    state = arrival(data, self._max_body)
                    if state is not Arrival.PARTIAL:
                        return state
                    if not begun:
                        begun, deadline = True, monotonic() + self._patience(RECEIVE_TIMEOUT)
                    if _asks(data):
                        client.send(b"HTTP/1.1 100 Continue\r\n\r\n")
                client.settimeout(max(0.001, deadline - monotonic()))
                received = client.recv(65536)
                if not received:
                    return Arrival.PARTIAL if data and client in self._waiting else None
                unreader.buf.seek(0, io.SEEK_END)
                unreader.buf.write(received)
        except TimeoutError:
            return None
        finally:
            self._waiting.discard(client)

    def _patience(self, seconds: float) -> float:
        return seconds if self.alive else STOP_TIMEOUT

    def _hang_up(self) -> None:
        while self._waiting:
            with contextlib.suppress(OSError):
                self._waiting.pop().shutdown(socket.SHUT_RD)


class Response(wsgi.Response):
    """An answer that goes out as one piece."""

    response_length: int | None

    def send(self, body: bytes) -> None:
        """Send head and body: the client is woken once, and finds all of it."""
        if self.response_length is None and not self._omits_body:
            self.response_length = len(body)
            self.headers.append(("Content-Length", str(len(body))))
        self.headers += [
            ("Server", self.version),
            ("Date", _date(int(time()))),
            ("Connection", "close" if self.should_close() else "keep-alive"),
        ]
        fields = "".join([f"{name}: {value}\r\n" for name, value in self.headers])
        head = f"HTTP/{self.req.version[0]}.{self.req.version[1]} {self.status}\r\n{fields}\r\n"
        data = head.encode("latin-1") + (b"" if self._omits_body else body)
        sent = self.sock.send(data)  # all of it, as a rule; sendall would ask the kernel first
        if sent < len(data):
            self.sock.sendall(data[sent:])


@functools.lru_cache(1)
def _date(second: int) -> str:
    return str(util.http_date(second))


def _close(client: Any) -> None:
    # As RFC 9112, section 9.6, says: an end, then what the peer may still send, then the close.
    with contextlib.suppress(OSError), gevent.Timeout(CLOSE_TIMEOUT, False):
        client.settimeout(None)
        client.shutdown(socket.SHUT_WR)
        while client.recv(65536):
            pass
    client.close()


def _asks(data: bytes) -> bool:
    # Whether the client waits for 100 Continue (RFC 9110, section 10.1.1). gunicorn sends it once
    # it has the request, and that has to wait for the body here.
    head = data.find(b"\r\n\r\n") == len(data) - 4
    return head and b" HTTP/1.1" in data.partition(b"\r\n")[0] and bool(EXPECTS.search(data))


def _nothing(size_hint: int | None = None) -> bytes:
    return b""


def _too_large(size_hint: int | None = None) -> bytes:
    # Who reads on where a body is not waited for answers 413, however much has come by chance.
    raise RequestEntityTooLarge
