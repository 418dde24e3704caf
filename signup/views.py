"""The HTTP contract: the endpoints, and the response to each failure."""

import json
import logging
from functools import partial
from typing import Any

import psycopg2
from flask import Flask, Response, g, request, send_from_directory
from gunicorn.http.errors import ParseException
from psycopg2.pool import PoolError
from werkzeug import exceptions

from .database import Database, describe
from .validation import InvalidField, parse_signup

# The status, the metrics' error_type, and the message to the client.
ERRORS: dict[type[Exception], tuple[int, str, str]] = {
    exceptions.HTTPException: (400, "invalid_json", "invalid request body"),  # any not listed here
    exceptions.RequestEntityTooLarge: (413, "invalid_json", "request body too large"),
    InvalidField: (400, "validation", ""),  # the exception contains the message
    exceptions.Conflict: (409, "duplicate_email", "email already exists"),
    exceptions.MethodNotAllowed: (405, "invalid_method", "method not allowed"),
    exceptions.NotFound: (404, "", "not found"),
    psycopg2.Error: (500, "database", "failed to create user"),
    PoolError: (503, "database", "service is busy, retry later"),
    Exception: (500, "internal", "internal server error"),
}


def init_app(app: Flask, database: Database, max_body_bytes: int) -> None:
    """Register the endpoints and the error handlers."""

    @app.post("/signup", provide_automatic_options=False)  # it must respond to OPTIONS with a 405
    def signup() -> Response:
        user = database.insert_user(parse_signup(_body(request.environ, max_body_bytes)))
        if not user:
            raise exceptions.Conflict
        return _json({"message": "user created successfully", "user": user}, 201)

    @app.get("/readyz")
    def readyz() -> Response:
        try:
            database.check()
        except psycopg2.Error as error:
            logging.error("database: %s", describe(error))
            return _json({"status": "database unavailable"}, 503)
        return _json({"status": "ok"})

    app.add_url_rule("/", "index", lambda: _json({"message": "welcome"}))
    app.add_url_rule("/healthz", "healthz", lambda: _json({"status": "ok"}))
    openapi = partial(send_from_directory, app.root_path, "openapi.json", conditional=False)
    app.add_url_rule("/openapi.json", "openapi", openapi)

    @app.errorhandler(Exception)
    def failed(error: Exception) -> Response:
        kind = next(kind for kind in type(error).__mro__ if kind in ERRORS)
        status, g.error_type, message = ERRORS[kind]  # counted by the hook in metrics.py
        response = _json({"error": message}, status)
        if isinstance(error, InvalidField):
            g.field, message = error.args
            response = _json({"error": message, "field": g.field}, status)
        elif isinstance(error, exceptions.MethodNotAllowed):
            response.headers["Allow"] = ", ".join(error.valid_methods or ())
        elif isinstance(error, PoolError):
            response.headers["Retry-After"] = "1"
        if g.error_type == "database":
            logging.error("database: %s", describe(error))
        elif g.error_type == "internal":
            g.unexpected = error  # logged with its traceback in logs.py
        return response


def _body(environ: dict[str, Any], limit: int) -> bytes:
    # Bypass werkzeug, which silently truncates a long body and accepts an incomplete one.
    length = int(environ.get("CONTENT_LENGTH") or 0)  # absent from a chunked request
    try:
        body: bytes = environ["wsgi.input"].read(length or limit + 1) if length <= limit else b""
    except (OSError, ParseException) as error:  # malformed chunks
        raise exceptions.BadRequest from error
    if max(length, len(body)) > limit:
        raise exceptions.RequestEntityTooLarge
    if len(body) < length:
        raise exceptions.BadRequest
    return body


def _json(body: dict[str, Any], status: int = 200) -> Response:
    return Response(json.dumps(body) + "\n", status, content_type="application/json")
