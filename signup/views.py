"""The HTTP contract: endpoints, and what each failure looks like to a client."""

import json
import logging
from pathlib import Path
from typing import Any

import psycopg2
from flask import Blueprint, Flask, Response, current_app, g, request
from gunicorn.http.errors import ParseException
from werkzeug.exceptions import HTTPException, MethodNotAllowed, NotFound, RequestEntityTooLarge

from .database import Database, DuplicateEmail, describe
from .pool import PoolTimeout
from .validation import InvalidBody, InvalidField, parse_signup

bp = Blueprint("signup", __name__)
log = logging.getLogger(__name__)

OPENAPI = Path(__file__).with_name("openapi.json").read_bytes()


def init_app(app: Flask) -> None:
    """Register the endpoints and the error handlers."""
    app.register_blueprint(bp)


# Flask would answer OPTIONS by itself; the contract says 405.
@bp.route("/signup", methods=["POST"], provide_automatic_options=False)
def signup() -> Response:
    # Past werkzeug, which cuts a chunked body off at its limit without a word, and does not tell
    # when the end of one is missing; the beginning may be JSON as well.
    environ, limit = request.environ, current_app.config["MAX_CONTENT_LENGTH"]
    length = int(environ.get("CONTENT_LENGTH") or -1)  # chunks announce none
    if length > limit:
        raise RequestEntityTooLarge
    try:
        body = environ["wsgi.input"].read(limit + 1 if length < 0 else length)
    except (OSError, ParseException) as error:  # chunks that break the rules
        raise InvalidBody from error
    if len(body) > limit:
        raise RequestEntityTooLarge
    if len(body) < length:
        raise InvalidBody
    user = _database().insert_user(parse_signup(body))
    return _json({"message": "user created successfully", "user": user}, 201)


@bp.get("/")
def welcome() -> Response:
    return _json({"message": "welcome"})


@bp.get("/healthz")
def healthz() -> Response:
    return _json({"status": "ok"})


@bp.get("/openapi.json")
def openapi() -> Response:
    return Response(OPENAPI, mimetype="application/json")


@bp.get("/readyz")
def readyz() -> Response:
    try:
        _database().check()
    except (psycopg2.Error, PoolTimeout) as error:
        _log_fault(f"not ready: {describe(error)}")
        return _json({"status": "database unavailable"}, 503)
    return _json({"status": "ok"})


@bp.errorhandler(InvalidBody)
def invalid_body(_: InvalidBody) -> Response:
    return _error(400, "invalid_json", "invalid request body")


@bp.errorhandler(InvalidField)
def invalid_field(error: InvalidField) -> Response:
    g.field = error.field
    return _error(400, "validation", str(error), field=error.field)


@bp.errorhandler(DuplicateEmail)
def duplicate_email(_: DuplicateEmail) -> Response:
    return _error(409, "duplicate_email", "email already exists")


@bp.errorhandler(psycopg2.Error)
def database_failed(error: psycopg2.Error) -> Response:
    _log_fault(describe(error))
    return _error(500, "database", "failed to create user")


@bp.errorhandler(PoolTimeout)
def busy(error: PoolTimeout) -> Response:
    _log_fault(describe(error))
    response = _error(503, "database", "service is busy, retry later")
    response.headers["Retry-After"] = "1"
    return response


@bp.app_errorhandler(RequestEntityTooLarge)
def too_large(_: RequestEntityTooLarge) -> Response:
    return _error(413, "invalid_json", "request body too large")


@bp.app_errorhandler(MethodNotAllowed)
def method_not_allowed(error: MethodNotAllowed) -> Response:
    response = _error(405, "invalid_method", "method not allowed")
    response.headers["Allow"] = ", ".join(error.valid_methods or ())
    return response


@bp.app_errorhandler(NotFound)
def not_found(_: NotFound) -> Response:
    return _error(404, "", "not found")


@bp.app_errorhandler(HTTPException)
def bad_request(_: HTTPException) -> Response:
    # What else werkzeug raises is a request that it can't make sense of.
    return _error(400, "invalid_json", "invalid request body")


@bp.app_errorhandler(Exception)
def internal(error: Exception) -> Response:
    log.exception("internal error")
    return _error(500, "internal", "internal server error")


def _log_fault(cause: str) -> None:
    if current_app.extensions["throttle"].allows(cause):
        log.error("database: %s", cause)


def _database() -> Database:
    database: Database = current_app.extensions["database"]
    return database


def _json(body: dict[str, Any], status: int = 200) -> Response:
    return Response(json.dumps(body) + "\n", status, content_type="application/json")


def _error(status: int, error_type: str, message: str, **details: str) -> Response:
    g.error_type = error_type  # for the hook that counts it
    return _json({"error": message, **details}, status)
