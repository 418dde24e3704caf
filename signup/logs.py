"""Logs: JSON lines without a request's body, query string, address, headers or unknown path."""

import logging
import re
from http import HTTPMethod
from random import getrandbits
from typing import Any

from flask import Response, g, request
from gunicorn import glogging
from pythonjsonlogger.json import JsonFormatter

SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_logged: dict[str, float] = {}  # when each throttled message was last logged


class GunicornLogger(glogging.Logger):
    """gunicorn's loggers, whose error handlers the root logger shares."""

    def setup(self, cfg: Any) -> None:
        super().setup(cfg)
        if cfg.logconfig or cfg.logconfig_dict or cfg.logconfig_json:
            return  # the operator configures logging
        names = {"levelname": "level", "process": "pid", "exc_info": "traceback"}
        fields = ["levelname", "process", "message"]  # plus the time (RFC 3339, UTC)
        for handler in self.error_log.handlers:
            handler.setFormatter(JsonFormatter(fields, timestamp="time", rename_fields=names))
            handler.addFilter(_filter)
        # At debug level, gunicorn logs requests, and settings that contain the password.
        self.error_log.setLevel(max(self.loglevel, logging.INFO))
        logging.root.handlers = self.error_log.handlers
        logging.root.setLevel(self.error_log.level)
        logging.captureWarnings(True)


def _filter(record: logging.LogRecord) -> bool:
    # gunicorn appends the client's address or input to these messages.
    if start := re.match("Invalid request|Error handling request", str(record.msg)):
        record.msg, record.args = start[0], ()
    if not re.match("Invalid request|database: ", str(record.msg)):
        return True
    message = record.getMessage()
    if abs(record.created - _logged.get(message, 0)) >= 1:  # each at most once a second
        _logged[message] = record.created
    return record.created == _logged[message]  # for each handler alike


def finish(response: Response) -> Response:
    """After a request: add its id, or a new one, to the response; log 500 and above."""
    environ, status = request.environ, response.status_code
    given = environ.get("HTTP_X_REQUEST_ID", "")
    name = given if SANE_ID.fullmatch(given) else f"{getrandbits(128):032x}"
    path = "other" if status == 404 else environ["PATH_INFO"]
    response.headers.add("X-Request-ID", name)
    # For the access log. An unknown method could contain personal data.
    method = request.method if request.method in HTTPMethod.__members__ else "other"
    environ |= {"signup.request_id": name, "signup.path": path, "signup.method": method}
    if status >= 500:
        what = {"request_id": name, "path": path, "status": status}
        logging.error("request failed", exc_info=g.get("unexpected"), extra=what)
    return response
