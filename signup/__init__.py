"""The signup service: an application factory, one line per concern."""

import os

from flask import Flask

from . import logs, metrics, views
from .config import Config
from .database import Database


def create_app() -> Flask:
    """Build the WSGI application of a worker that gunicorn.conf.py has prepared."""
    if not (share := os.environ.get("SIGNUP_CONNECTIONS")):
        what = "gunicorn.conf.py was not read (see --config), or preload_app is set"
        error = RuntimeError if "SERVER_SOFTWARE" in os.environ else SystemExit  # gunicorn sets it
        raise error(f"start the service with `make run` or `gunicorn app:app`: {what}")
    config, measured = Config.from_env(workers=1), metrics.Metrics(int(share))
    app = Flask(__name__, static_folder=None)
    app.before_request(measured.start)
    app.after_request(logs.finish)
    app.after_request(measured.finish)
    app.add_url_rule("/metrics", "metrics", measured.expose)
    views.init_app(app, Database(config, int(share), measured), config.max_body_bytes)
    return app
