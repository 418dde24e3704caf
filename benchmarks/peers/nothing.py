"""The server alone: a WSGI application without framework, validation, metrics or database."""

from collections.abc import Callable, Iterable
from typing import Any

ANSWER = b'{"message": "user created successfully"}\n'


def app(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
    environ["wsgi.input"].read()
    status = "201 CREATED" if environ["REQUEST_METHOD"] == "POST" else "405 METHOD NOT ALLOWED"
    start(status, [("Content-Length", str(len(ANSWER)))])
    return [ANSWER]
