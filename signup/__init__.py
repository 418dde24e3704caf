"""The signup service: an application factory, one line per concern."""

import json
import os

from flask import Flask

from . import logs, metrics, views
from .config import Config
from .database import Database
from .slots import Slot


def create_app(config: Config | None = None) -> Flask:
    """Build the WSGI application. Raises ConfigError, or RuntimeError without gunicorn.conf.py."""
    config = config or Config.from_env(workers=1)
    given = os.environ.get("SIGNUP_SLOT")  # set by gunicorn.conf.py
    slot = Slot(*json.loads(given)) if given else None
    if slot is None and os.environ.get("SERVER_SOFTWARE", "").startswith("gunicorn/"):
        raise RuntimeError("gunicorn.conf.py was not read (see --config), or preload_app is set")
    connections = slot.connections if slot else config.database_max_connections
    measured = metrics.Metrics(slot, connections)
    app = Flask(__name__, static_folder=None)
    logs.init_app(app)
    metrics.init_app(app, measured)
    views.init_app(app, Database(config, connections, measured), config.max_body_bytes)
    return app
