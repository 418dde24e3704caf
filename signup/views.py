"""The HTTP contract: endpoints, and what each failure looks like to a client."""

import json
import logging
from typing import Any

import psycopg2
from flask import Blueprint, Flask, Response, current_app, g, request
from werkzeug.exceptions import HTTPException, MethodNotAllowed, NotFound, RequestEntityTooLarge

from .database import Database, DuplicateEmail, PoolTimeout, describe
from .validation import InvalidBody, InvalidField, parse_signup

bp = Blueprint("signup", __name__)
log = logging.getLogger(__name__)


def init_app(app: Flask) -> None:
    """Register the endpoints and the error handlers."""
    app.register_blueprint(bp)


@bp.before_app_request
def one_path_one_resource() -> None:
    if request.environ["PATH_INFO"].startswith("//"):  # werkzeug would take it for one slash
        raise NotFound


# Flask would answer OPTIONS by itself; the contract says 405.
@bp.route("/signup", methods=["POST"], provide_automatic_options=False)
def signup() -> Response:
    body = request.get_data(cache=False)
    if len(body) == current_app.config["MAX_CONTENT_LENGTH"]:
        raise RequestEntityTooLarge
    user = _database().insert_user(parse_signup(body))
    return _json({"message": "user created successfully", "user": user}, 201)


@bp.get("/")
def welcome() -> Response:
    return _json({"message": "welcome"})


@bp.get("/healthz")
def healthz() -> Response:
    return _json({"status": "ok"})


@bp.get("/readyz")
def readyz() -> Response:
    try:
        _database().check()
    except (psycopg2.Error, PoolTimeout):
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
    log.error("database: %s", describe(error))
    return _error(500, "database", "failed to create user")


@bp.errorhandler(PoolTimeout)
def busy(_: PoolTimeout) -> Response:
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
    # What else werkzeug raises is a request that it can't make sense of, or a body cut short.
    return _error(400, "invalid_json", "invalid request body")


@bp.app_errorhandler(Exception)
def internal(error: Exception) -> Response:
    log.exception("internal error")
    return _error(500, "internal", "internal server error")


def _database() -> Database:
    database: Database = current_app.extensions["database"]
    return database


def _json(body: dict[str, Any], status: int = 200) -> Response:
    return Response(json.dumps(body) + "\n", status, mimetype="application/json")


def _error(status: int, error_type: str, message: str, **details: str) -> Response:
    g.error_type = error_type  # for the hook that counts it
    return _json({"error": message, **details}, status)
