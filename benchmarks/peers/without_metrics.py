"""Peer (c): this service with its metrics off, to show what they cost."""

from typing import Any

from flask import Flask

from signup import create_app, metrics
from signup.config import Config


class Nothing:
    """A metric that counts nothing, and a set of such metrics."""

    def inc(self) -> None:
        pass

    def set(self, value: float) -> None:
        pass

    def observe(self, seconds: float) -> None:
        pass

    def __getitem__(self, label: str) -> "Nothing":
        return self


def init_app(app: Flask, config: Config) -> None:
    nothing: Any = Nothing()
    nothing.insert_duration = nothing.pool_wait = nothing.pool_timeouts = nothing
    nothing.connections = nothing
    app.extensions["metrics"] = nothing


metrics.init_app = init_app
app = create_app()
