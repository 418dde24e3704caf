"""The signup service: an application factory, one line a concern."""

from flask import Flask

from . import database, logs, metrics, views
from .config import Config


def create_app(config: Config | None = None) -> Flask:
    """The WSGI application, configured from the environment unless a `config` is given.

    Opens no database connection: the pool connects when the first request needs one.
    Raises ConfigError when a variable is wrong or DATABASE_URL is missing.
    """
    config = config or Config.from_env()
    app = Flask(__name__, static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = config.max_body_bytes
    app.url_map.merge_slashes = False  # //signup is another path: 404, not a redirect
    logs.init_app(app, config)
    metrics.init_app(app, config)
    database.init_app(app, config)
    views.init_app(app)
    return app
