"""nginx in front of the service, with nginx/nginx.conf."""

import itertools
import socket
from typing import Any

import requests
from requests.adapters import HTTPAdapter

from . import ROOT
from .programs import Program, free_port, listens
from .service import Client, Samples, Service


class FromAddress(HTTPAdapter):
    """Connects from `address`, which may be any of 127.0.0.0/8."""

    def __init__(self, address: str) -> None:
        self._address = address
        super().__init__()

    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        super().init_poolmanager(*args, source_address=(self._address, 0), **options)


class Nginx(Program, Client):
    """nginx with nginx/nginx.conf, except for its port and the replicas, which are `services`.

    Each signup comes from a new client address, so the rate limit per client does not apply. The
    metrics are the sum over all services.
    """

    def __init__(self, *services: Service) -> None:
        super().__init__()
        self.services = services
        self._addresses = itertools.count(127 << 24 | 1 << 16)

    def command(self) -> list[str]:
        self._port = free_port()
        text = (ROOT / "nginx/nginx.conf").read_text()
        assert text.count("listen 8080;") == 1
        text = text.replace("listen 8080;", f"listen 127.0.0.1:{self._port};")
        (self.folder / "nginx.conf").write_text(text)
        replicas = [
            f"server {service.url.removeprefix('http://')} fail_timeout=5s;\n"
            for service in self.services
        ]
        (self.folder / "replicas.conf").write_text("".join(replicas))
        # Debian's nginx opens its default log before it reads the configuration.
        options = ["-e", "stderr", "-g", "daemon off;"]
        return ["nginx", "-p", str(self.folder), "-c", str(self.folder / "nginx.conf"), *options]

    def address(self) -> str | None:
        return f"http://127.0.0.1:{self._port}" if listens(self._port) else None

    def signup(self, method: str = "POST", **options: Any) -> requests.Response:
        """Send a request to /signup over a new connection, from `address` or a new address."""
        number = next(self._addresses)
        address = options.pop("address", socket.inet_ntoa(number.to_bytes(4, "big")))
        with requests.Session() as session:
            session.mount("http://", FromAddress(address))
            return super().signup(method, **options | {"session": session})

    def metrics(self, openmetrics: bool = False) -> Samples:
        totals = Samples()
        for service in self.services:
            for key, value in service.metrics(openmetrics).items():
                totals[key] = totals.get(key, 0) + value
        return totals
