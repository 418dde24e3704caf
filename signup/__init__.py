"""The signup service: an application factory, one line a concern."""

import os

from flask import Flask

from . import logs, metrics, slots, views
from .config import Config, ConfigError
from .database import Database


def create_app(config: Config | None = None) -> Flask:
    """The WSGI application, configured from the environment unless a `config` is given.

    Raises ConfigError for a wrong or missing variable, and in a gunicorn worker that
    gunicorn.conf.py has not set up: it would count for itself alone.
    """
    config, slot = config or Config.from_env(), slots.current
    config.check(workers=1)
    if slot is None and os.environ.get("SERVER_SOFTWARE", "").startswith("gunicorn/"):
        raise ConfigError("gunicorn.conf.py was not read: start in its folder, or use --config")
    connections = slot.connections if slot else config.database_max_connections
    measured = metrics.Metrics(slot, connections)
    app = Flask(__name__, static_folder=None)
    logs.init_app(app)
    metrics.init_app(app, measured)
    views.init_app(app, Database(config, connections, measured), config.max_body_bytes)
    return app
