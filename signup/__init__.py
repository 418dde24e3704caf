"""The signup service: an application factory, one line a concern."""

from collections.abc import Callable
from typing import Any

from flask import Flask, Request
from flask.sessions import NullSession, SessionInterface
from werkzeug.exceptions import NotFound
from werkzeug.routing import MapAdapter

from . import database, logs, metrics, views
from .config import Config


class NoSession(SessionInterface):
    """The same empty session for all, which can't be written to."""

    session = NullSession()

    def open_session(self, app: Flask, request: Request) -> NullSession:
        return self.session


class App(Flask):
    """Flask, less what it does for sessions, and for routes with coroutines or hosts."""

    session_interface = NoSession()

    def ensure_sync(self, func: Callable[..., Any]) -> Callable[..., Any]:
        return func

    def create_url_adapter(self, request: Request | None) -> MapAdapter | None:
        if request is None:
            return None
        # werkzeug would put a slash in front (`POST signup?:// HTTP/1.1`) or take two for one, and
        # serve what is not counted.
        path = request.environ["PATH_INFO"]
        if not path.startswith("/") or path.startswith("//"):
            raise NotFound
        return MapAdapter(
            self.url_map, "", "/", "", "http", request.path, request.method, query_args=None
        )


def create_app(config: Config | None = None) -> Flask:
    """The WSGI application, configured from the environment unless a `config` is given.

    Opens no database connection: the pool connects when the first request needs one.
    Raises ConfigError when a variable is wrong or DATABASE_URL is missing.
    """
    config = config or Config.from_env()
    app = App(__name__, static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = config.max_body_bytes
    app.url_map.merge_slashes = False  # //signup is another path: 404, not a redirect
    logs.init_app(app, config)
    metrics.init_app(app, config)
    database.init_app(app, config)
    views.init_app(app)
    return app
