"""What stands between the service and a server: a relay, or a network of the test's own."""

import contextlib
import ctypes
import os
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self
from urllib.parse import parse_qs, urlsplit

from .database import Postgres
from .pgbouncer import PgBouncer
from .postgres import SOCKET_NAME
from .programs import find_program

NAME = "db.example"
FILES = {  # of /etc
    "hosts": f"127.0.0.1 {NAME}\n",
    "nsswitch.conf": "hosts: files dns\n",  # not systemd-resolved, which keeps the real network
    "resolv.conf": "nameserver 127.0.0.1\n",
}
CLONE_FS, CLONE_NEWNS, CLONE_NEWNET = 0x200, 0x20000, 0x40000000  # from <sched.h>
Server = Postgres | PgBouncer
Pair = tuple[socket.socket, socket.socket]  # a client, and its connection to the server
LIBC = ctypes.CDLL(None, use_errno=True)


class Relay:
    """Forwards a `port` of `host` to a server during a `with` block.

    It can switch to another server, or go silent. Data takes `delay` seconds in each direction.
    """

    def __init__(self, server: Server, host: str = "127.0.0.1", delay: float = 0) -> None:
        self._host, self._delay = host, delay
        self._lock = threading.Lock()
        self._pairs: dict[Pair, Server] = {}
        self._silent: set[Pair] = set()
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

    def move(self, server: Server) -> None:
        """Forward new connections to `server`; open ones keep their server."""
        self._server = server

    def go_silent(self) -> None:
        """Stop forwarding on the connections that are open now, without closing them."""
        self._silent |= self._pairs.keys()

    def connections(self, server: Postgres) -> int:
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
            place = f"{folders[0]}/{SOCKET_NAME}" if folders else (parts.hostname, parts.port)
            try:
                target.connect(place)
            except OSError:  # the server is down
                client.close()
                target.close()
                continue
            pair = client, target
            self._pairs[pair] = self._server
            for source, sink in (pair, pair[::-1]):
                ends = (pair, source, sink)
                threading.Thread(target=self._forward, args=ends, daemon=True).start()

    def _forward(self, pair: Pair, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if pair not in self._silent:
                    time.sleep(self._delay)
                    sink.sendall(data)
        if pair not in self._silent or source is pair[0]:  # a client must not see the server close
            self._close(pair)

    def _close(self, pair: Pair) -> None:
        with self._lock:
            if pair not in self._pairs:
                return
            for end in pair:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
                end.close()
            del self._pairs[pair]  # only now: connections() counts what a client may take for open


def address(url: str, *relays: Relay) -> str:
    """Return the URL of the same database through `relays`."""
    parts = urlsplit(url)
    login = f"{parts.username}:{parts.password}"
    hosts = ",".join(f"127.0.0.1:{relay.port}" for relay in relays)
    attributes = "?target_session_attrs=read-write" if len(relays) > 1 else ""
    return f"postgresql://{login}@{hosts}{parts.path}{attributes}"


@contextlib.contextmanager
def namespace() -> Iterator[Path]:
    """Move this thread, and all that it starts, to a network and a mount namespace of their own.

    For root on Linux. There is only loopback, and a name server that never responds. Yields a
    folder with the FILES that are in /etc there. It is temporary, and any user can read it. The
    namespaces disappear with their last process.
    """
    here = Path.cwd()
    with (
        Path("/proc/thread-self/ns/net").open() as network,
        Path("/proc/thread-self/ns/mnt").open() as mounts,
        tempfile.TemporaryDirectory(prefix="signup-test-", dir="/tmp") as folder,
    ):
        Path(folder).chmod(0o755)
        call("unshare", CLONE_NEWNS | CLONE_NEWNET)
        try:
            run("mount", "--make-rprivate", "/")  # the other namespace must not see the next mounts
            run("ip", "link", "set", "lo", "up")
            for name, text in FILES.items():
                Path(folder, name).write_text(text)
                mount(Path(folder, name), f"/etc/{name}")
            with socket.socket(type=socket.SOCK_DGRAM) as server:
                server.bind(("127.0.0.1", 53))
                yield Path(folder)
        finally:
            call("unshare", CLONE_FS)  # setns refuses while threads share this one's folder
            call("setns", network.fileno(), CLONE_NEWNET)
            call("setns", mounts.fileno(), CLONE_NEWNS)
            os.chdir(here)


def mount(source: Path, target: str) -> None:
    """Replace `target` by `source`, in this namespace alone."""
    run("mount", "--bind", str(source), target)


def run(name: str, *arguments: str) -> None:
    subprocess.run([str(find_program(name)), *arguments], check=True)


def call(name: str, *arguments: int) -> None:
    """Call a function of libc; Python has these two since 3.12."""
    if LIBC[name](*arguments):
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
