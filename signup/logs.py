"""Logs: JSON lines, where gunicorn's settings errorlog and accesslog say.

None has a request's body, query string, address or headers, nor any path but the service's own:
a client may write anything there.
"""

import logging
import re
from random import getrandbits
from typing import Any

from flask import Flask, Response, g, request
from gunicorn import glogging
from pythonjsonlogger.json import JsonFormatter

SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"}
# In the WSGI environment, which is at hand where flask.g is not.
REQUEST_ID, PATH = "signup.request_id", "signup.path"

log = logging.getLogger("signup")


class GunicornLogger(glogging.Logger):
    """gunicorn's loggers, and on the handlers of its errors everybody else's."""

    def setup(self, cfg: Any) -> None:
        super().setup(cfg)
        if cfg.logconfig or cfg.logconfig_dict or cfg.logconfig_json:
            return  # the user's own
        # Time (RFC 3339, UTC), level, pid and message, and what else a record has.
        names = {"levelname": "level", "process": "pid", "exc_info": "traceback"}
        fields = ["levelname", "process", "message"]
        for handler in (*self.error_log.handlers, *self.access_log.handlers):
            handler.setFormatter(JsonFormatter(fields, timestamp="time", rename_fields=names))
        self.error_log.filters, self.access_log.filters = [_impersonal], [_access_fields]
        # gunicorn's lines of level debug quote requests, and its settings with a password.
        self.error_log.setLevel(max(self.loglevel, logging.INFO))
        logging.root.handlers = self.error_log.handlers
        logging.root.setLevel(self.error_log.level)
        logging.captureWarnings(True)


def _impersonal(record: logging.LogRecord) -> bool:
    # These of gunicorn's go on with the client's address, or with what the client wrote.
    for start in ("Invalid request", "Error handling request"):
        if str(record.msg).startswith(start):
            record.msg, record.args = start, ()
    return True


def _access_fields(record: logging.LogRecord) -> bool:
    # Of the atoms that gunicorn's access_log_format may use, those that are not personal.
    if isinstance(atoms := record.args, dict):
        record.request_id = atoms[f"{{{REQUEST_ID}}}e"]
        record.method = atoms["m"] if atoms["m"] in METHODS else "other"
        record.path = atoms[f"{{{PATH}}}e"]
        record.status = int(atoms["s"])
        record.duration = atoms["D"] / 1_000_000  # seconds
    return True


def init_app(app: Flask) -> None:
    """Give each request an id, and each answer that id; log the answers of 500 and above."""
    paths: set[str] = set()

    @app.before_request
    def start() -> None:
        environ = request.environ
        given = environ.get("HTTP_X_REQUEST_ID", "")
        environ[REQUEST_ID] = given if SANE_ID.fullmatch(given) else f"{getrandbits(128):032x}"
        if not paths:  # all routes are there only now
            paths.update(rule.rule for rule in app.url_map.iter_rules())
        environ[PATH] = environ["PATH_INFO"] if environ["PATH_INFO"] in paths else "other"

    @app.after_request
    def finish(response: Response) -> Response:
        environ = request.environ
        response.headers.add("X-Request-ID", environ[REQUEST_ID])
        if response.status_code >= 500:
            what = {"path": environ[PATH], "status": response.status_code}
            what["request_id"] = environ[REQUEST_ID]
            log.error("request failed", exc_info=g.get("unexpected"), extra=what)
        return response
