"""A TCP address that leads to a PostgreSQL, can be moved to another one, and can go silent."""

import contextlib
import socket
import threading
from typing import Self
from urllib.parse import parse_qs, urlsplit

from .database import Postgres
from .postgres import SOCKET_NAME


class Relay:
    """A `port` of 127.0.0.1 in front of a server, closed after the `with` block."""

    def __init__(self, server: Postgres) -> None:
        self._lock = threading.Lock()
        self._pairs: dict[tuple[socket.socket, socket.socket], Postgres] = {}
        self._silent: set[tuple[socket.socket, socket.socket]] = set()
        self.move(server)

    def __enter__(self) -> Self:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for pair in list(self._pairs):
            self._close(pair)

    def move(self, server: Postgres) -> None:
        """Lead new connections to `server`; those that are open stay where they are."""
        self._server = server

    def go_silent(self) -> None:
        """Forward nothing more of the connections that are open now, and keep them open."""
        self._silent |= self._pairs.keys()

    def connections(self, server: Postgres) -> int:
        """How many connections to `server` clients have open."""
        return list(self._pairs.values()).count(server)

    def silent_connections(self) -> int:
        """How many of those that went silent clients have still open."""
        return len(self._silent & self._pairs.keys())

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # closed
                return
            target = socket.socket(socket.AF_UNIX)
            folder = parse_qs(urlsplit(self._server.url).query)["host"][0]
            try:
                target.connect(f"{folder}/{SOCKET_NAME}")
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
        self,
        pair: tuple[socket.socket, socket.socket],
        source: socket.socket,
        sink: socket.socket,
    ) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if pair not in self._silent:
                    sink.sendall(data)
        if pair not in self._silent or source is pair[0]:  # no news of a server's end either
            self._close(pair)

    def _close(self, pair: tuple[socket.socket, socket.socket]) -> None:
        with self._lock:
            if self._pairs.pop(pair, None) is None:
                return
        for end in pair:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
