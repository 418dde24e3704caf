"""nginx in front of the service, with the files of nginx/."""

import itertools
import re
import socket
import subprocess
from pathlib import Path
from typing import Any

import requests
from requests.adapters import HTTPAdapter

from . import ROOT
from .programs import Program, find_program, free_port, listens
from .service import Client, Samples, Service

LOG_ALL = {'"" $sampled;': '"" 1;'}  # an edit: log each request, not 1 % of some


def certify(folder: Path) -> str:
    """Write a new self-signed certificate for 127.0.0.1, which HUP applies; return it.

    Clients that trust `folder`/trusted.pem trust the earlier ones as well.
    """
    (folder / "tls").mkdir(parents=True, exist_ok=True)
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2"
    command += " -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    command += " -keyout tls/privkey.pem -out tls/fullchain.pem"
    subprocess.run(command.split(), cwd=folder, check=True, capture_output=True)
    certificate = (folder / "tls/fullchain.pem").read_text()
    with (folder / "trusted.pem").open("a") as trusted:
        trusted.write(certificate)
    return certificate


class FromAddress(HTTPAdapter):
    """Connects from `address`, which may be any of 127.0.0.0/8."""

    def __init__(self, address: str) -> None:
        self._address = address
        super().__init__()

    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        super().init_poolmanager(*args, source_address=(self._address, 0), **options)


class Nginx(Program, Client):
    """nginx with nginx/`entry`, except for its ports and the replicas, which are `services`.

    `edits` replaces further text in its files. `ports` maps their ports to those on 127.0.0.1. Each
    signup comes from a new client address, so the rate limit per client does not apply. The metrics
    are the sum over all services.
    """

    def __init__(
        self, *services: Service, entry: str = "nginx.conf", edits: dict[str, str] | None = None
    ) -> None:
        super().__init__()
        self.services = services
        self.entry = entry
        self.ports = {port: free_port() for port in (8080, 8081, 8082, 8443)}
        self._edits = edits or {}
        self._addresses = itertools.count(127 << 24 | 1 << 16)

    def command(self) -> list[str]:
        texts = {path.name: path.read_text() for path in (ROOT / "nginx").glob("*.conf")}
        texts["replicas.conf"] = "".join(
            f"server {service.url.removeprefix('http://')} fail_timeout=5s;\n"
            for service in self.services
        )
        edits = {f"listen {port}": f"listen 127.0.0.1:{self.ports[port]}" for port in self.ports}
        edits |= {"/etc/nginx": str(self.folder)} | self._edits
        program = [str(find_program("nginx")), "-v"]
        version = subprocess.run(program, capture_output=True, text=True, check=True).stderr
        if tuple(map(int, re.findall(r"\d+", version)[:2])) < (1, 25):
            edits |= {" ssl;": " ssl http2;", "http2 on;": ""}
        for old, new in edits.items():
            assert any(old in text for text in texts.values()), old
            texts = {name: text.replace(old, new) for name, text in texts.items()}
        for name, text in texts.items():
            (self.folder / name).write_text(text)
        self.folder.chmod(0o755)  # nginx' workers read acme/ as another user
        if self.entry == "https.conf":
            certify(self.folder)
        # Debian's nginx opens its default log before it reads the configuration.
        options = ["-e", "stderr", "-g", "daemon off;"]
        return ["nginx", "-p", str(self.folder), "-c", str(self.folder / self.entry), *options]

    def address(self) -> str | None:
        port = self.ports[8080]
        return f"http://127.0.0.1:{port}" if listens(port) else None

    def connect(self, address: str = "", port: int = 8080) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.ports[port]), 30, (address, 0))

    def signup(self, method: str = "POST", **options: Any) -> requests.Response:
        """Send a request to /signup over a new connection, from `address` or a new address."""
        number = next(self._addresses)
        address = options.pop("address", socket.inet_ntoa(number.to_bytes(4, "big")))
        with requests.Session() as session:
            for scheme in ("http://", "https://"):
                session.mount(scheme, FromAddress(address))
            options |= {"session": session, "verify": str(self.folder / "trusted.pem")}
            return super().signup(method, **options)

    def metrics(self, openmetrics: bool = False) -> Samples:
        totals = Samples()
        for service in self.services:
            for key, value in service.metrics(openmetrics).items():
                totals[key] = totals.get(key, 0) + value
        return totals
