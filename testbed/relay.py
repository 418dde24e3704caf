"""A TCP relay to a server, which can switch to another server, delay the traffic or go silent."""

import contextlib
import socket
import threading
import time
from typing import Self
from urllib.parse import parse_qs, urlsplit

from .database import Postgres
from .pgbouncer import PgBouncer
from .postgres import SOCKET_NAME


class Relay:
    """Forwards a `port` of `host` to a server during a `with` block.

    `delay` is the time that data takes in each direction, in seconds.
    """

    def __init__(
        self, server: Postgres | PgBouncer, host: str = "127.0.0.1", delay: float = 0
    ) -> None:
        self._host, self._delay = host, delay
        self._lock = threading.Lock()
        self._pairs: dict[tuple[socket.socket, socket.socket], Postgres | PgBouncer] = {}
        self._silent: set[tuple[socket.socket, socket.socket]] = set()
        self.move(server)

    def __enter__(self) -> Self:
        self._listener = socket.create_server((self._host, 0), backlog=128)
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for pair in list(self._pairs):
            self._close(pair)

    def move(self, server: Postgres | PgBouncer) -> None:
        """Forward new connections to `server`; open ones keep their server."""
        self._server = server

    def go_silent(self) -> None:
        """Stop forwarding on the connections that are open now, without closing them."""
        self._silent |= self._pairs.keys()

    def connections(self, server: Postgres) -> int:
        """Return the number of open client connections to `server`."""
        return list(self._pairs.values()).count(server)

    def silent_connections(self) -> int:
        """Return how many silent connections the clients still have open."""
        return len(self._silent & self._pairs.keys())

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # closed
                return
            parts = urlsplit(self._server.url)
            folders = parse_qs(parts.query).get("host")  # of a Unix socket
            target = socket.socket(socket.AF_UNIX if folders else socket.AF_INET)
            try:
                target.connect(
                    f"{folders[0]}/{SOCKET_NAME}" if folders else (parts.hostname, parts.port)
                )
            except OSError:  # the server is down
                client.close()
                target.close()
                continue
            pair = client, target
            self._pairs[pair] = self._server
            for source, sink in (pair, pair[::-1]):
                threading.Thread(
                    target=self._forward, args=(pair, source, sink), daemon=True
                ).start()

    def _forward(
        self, pair: tuple[socket.socket, socket.socket], source: socket.socket, sink: socket.socket
    ) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if pair not in self._silent:
                    time.sleep(self._delay)
                    sink.sendall(data)
        if pair not in self._silent or source is pair[0]:  # a client must not see the server close
            self._close(pair)

    def _close(self, pair: tuple[socket.socket, socket.socket]) -> None:
        with self._lock:
            if pair not in self._pairs:
                return
            for end in pair:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
                end.close()
            del self._pairs[pair]  # only now: connections() counts what a client may take for open
