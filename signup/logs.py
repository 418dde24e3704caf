"""Logs: one JSON line an event on standard output, with no personal data and no secret in it.

So no line has a request's body, query string, address or headers, nor any path but the service's
own, since a client may write anything there.
"""

import contextlib
import fcntl
import json
import logging
import os
import re
import sys
import threading
import traceback
import zlib
from datetime import UTC, datetime
from pathlib import Path
from random import getrandbits
from time import perf_counter, time
from typing import Any

from flask import Flask, Response, has_request_context, request
from gunicorn import glogging

from .config import Config

SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"}
PROBES = {"/healthz", "/readyz", "/metrics"}  # logged at level debug

STDOUT = 1
# In the WSGI environment, which is at hand where flask.g has to be looked up at each access.
REQUEST_ID, RECEIVED = "signup.request_id", "signup.received"

log = logging.getLogger("signup")


class JsonFormatter(logging.Formatter):
    """A line of JSON: time (RFC 3339, UTC), level, message, and the request's id."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": _rfc3339(record.created),
            "level": record.levelname.lower(),
            "message": _message(record),
        }
        if has_request_context() and REQUEST_ID in request.environ:
            line["request_id"] = request.environ[REQUEST_ID]
        if record.exc_info:
            line["traceback"] = "".join(traceback.format_exception(*record.exc_info))
        return json.dumps(line)


def _rfc3339(timestamp: float) -> str:
    time = datetime.fromtimestamp(timestamp, UTC).isoformat(timespec="milliseconds")
    return time.replace("+00:00", "Z")


def _message(record: logging.LogRecord) -> str:
    message = record.getMessage()
    # gunicorn's line goes on with the client's address and a quotation from its request.
    return "invalid request" if message.startswith("Invalid request from ") else message


def configure(level: str) -> None:
    """Send all events from `level` up to standard output, as JSON."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


class GunicornLogger(glogging.Logger):
    """gunicorn's own events, on the same handler as ours."""

    def setup(self, cfg: Any) -> None:
        super().setup(cfg)
        self.error_log.handlers.clear()
        self.error_log.propagate = True


class Throttle:
    """At most one line a second for each cause, over all workers that share `file`.

    Who logs a cause holds a record lock on a byte of the file for that second.
    """

    def __init__(self, file: Path | None) -> None:
        self._file = file and file.open("w")  # never closed: that would drop all locks
        self._held: set[int] = set()
        self._lock = threading.Lock()

    def allows(self, cause: str) -> bool:
        """Whether `cause` may be logged now."""
        place = zlib.crc32(cause.encode())
        with self._lock:
            if place in self._held:
                return False
            if self._file:
                try:
                    fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
                except OSError:
                    return False
            self._held.add(place)
        release = threading.Timer(1.0, self._release, [place])
        release.daemon = True
        release.start()
        return True

    def _release(self, place: int) -> None:
        with self._lock:
            self._held.remove(place)
            if self._file:
                fcntl.lockf(self._file, fcntl.LOCK_UN, 1, place)


def init_app(app: Flask, config: Config) -> None:
    """Give each request an id, and each answer that id and a line in the log."""
    throttle = config.metrics_dir and config.metrics_dir / "log.lock"
    app.extensions["throttle"] = Throttle(throttle)
    paths: set[str] = set()

    @app.before_request
    def start() -> None:
        environ = request.environ
        given = environ.get("HTTP_X_REQUEST_ID", "")
        environ[REQUEST_ID] = given if SANE_ID.fullmatch(given) else f"{getrandbits(128):032x}"
        environ[RECEIVED] = perf_counter()

    @app.after_request
    def finish(response: Response) -> Response:
        environ = request.environ
        request_id = environ[REQUEST_ID]
        response.headers.add("X-Request-ID", request_id)
        if not paths:  # all routes are there only now
            paths.update(rule.rule for rule in app.url_map.iter_rules())
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        level = logging.DEBUG if path in PROBES else logging.INFO
        if log.isEnabledFor(level):
            # By hand, and past logging, whose records and locks cost more than the line: no value
            # here needs an escape. As there, no request fails because nobody takes its line.
            line = (
                f'{{"time": "{_rfc3339(time())}", "level": "{logging.getLevelName(level).lower()}"'
                f', "message": "request", "request_id": "{request_id}"'
                f', "method": "{method if method in METHODS else "other"}"'
                f', "path": "{path if path in paths else "other"}"'
                f', "status": {response.status_code}'
                f', "duration": {perf_counter() - environ[RECEIVED]:.6f}}}\n'
            )
            with contextlib.suppress(OSError):
                os.write(STDOUT, line.encode())
        return response
