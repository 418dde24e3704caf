"""Peer (c): this service with its metrics off, to show what they cost."""

from typing import Any

from flask import Flask

from signup import database, logs, views
from signup.config import Config


class Nothing:
    """Takes every call of a metric, and a scrape's place as well, and does nothing."""

    def __getattr__(self, name: str) -> "Nothing":
        return self

    def __getitem__(self, name: str) -> "Nothing":
        return self

    def __call__(self, *arguments: Any) -> "Nothing":
        return self

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


def create_app() -> Flask:
    config = Config.from_env()
    app = Flask("signup", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = config.max_body_bytes
    app.url_map.merge_slashes = False
    app.extensions["metrics"] = Nothing()
    logs.init_app(app, config)
    database.init_app(app, config)
    views.init_app(app)
    return app


app = create_app()
