"""Configuration from environment variables, read once and checked at startup."""

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any, get_type_hints

import psycopg2

URL = "postgresql://user:password@host:port/database"
LOG_LEVELS = ("debug", "info", "warning", "error", "critical")


class ConfigError(SystemExit):
    """The service can't start. The message has one line per mistake, and no secrets."""


@dataclass(frozen=True)
class Config:
    """The settings, each from the environment variable of its name; README.md explains them."""

    port: Annotated[int, 1, 65535] = 3000
    database_url: str = ""
    database_max_connections: Annotated[int, 1, 10_000] = 25
    database_pool_timeout: Annotated[float, 0.01, 60] = 5.0
    database_statement_timeout: Annotated[float, 0.01, 60] = 5.0
    metrics_sample_interval: Annotated[float, 0.01, 60] = 1.0
    max_body_bytes: Annotated[int, 1, 2**20] = 16384
    web_concurrency: Annotated[int, 1, 256] = 0  # 0: one worker per core, see gunicorn.conf.py
    log_level: str = "info"

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ, workers: int = 0) -> "Config":
        """Read every variable; an unset or empty one has its default. Raises ConfigError."""
        values: dict[str, Any] = {}
        mistakes = []
        for name, hint in get_type_hints(cls, include_extras=True).items():
            text = env.get(name.upper(), "").strip()
            if text and hint is str:
                values[name] = text
            elif text:
                kind, (low, high) = hint.__origin__, hint.__metadata__
                with suppress(ValueError):
                    values[name] = kind(text)
                if not low <= values.get(name, 0) <= high:  # 0 is in no range
                    what = f"use {low} to {high} {'(an integer)' if kind is int else 'seconds'}"
                    mistakes.append(f"{name.upper()}: {text!r} is not allowed: {what}")
        config = cls(**values)
        if (level := config.log_level).lower() not in LOG_LEVELS:
            mistakes.append(f"LOG_LEVEL: {level!r} is not allowed: use {' or '.join(LOG_LEVELS)}")
        if 0 < (budget := config.database_max_connections) < workers:
            what = f"each of {workers} workers needs a connection"
            mistakes.append(f"DATABASE_MAX_CONNECTIONS: '{budget}' is not allowed: {what}")
        if config.database_url and (mistake := _mistake_in_url(config.database_url, env)):
            mistakes.append(f"DATABASE_URL is not allowed: {mistake}")
        elif workers and not config.database_url:
            mistakes.append(f"DATABASE_URL is not set: use {URL}, or `make run` for a PostgreSQL")
        if mistakes:
            raise ConfigError("\n".join(mistakes))
        return config


def _mistake_in_url(url: str, env: Mapping[str, str]) -> str | None:
    # libpq would take part of such a password for a host, port or database, and quote it.
    scheme, _, rest = url.partition("://")
    if re.search(r"[#\s'\"]|%(?![\dA-Fa-f]{2})|[@/][^?]*@", rest):
        return "percent-encode @ / # % quotes and spaces in the user, password and database"
    try:
        dsn = psycopg2.extensions.parse_dsn(url)
        limited = float(dsn.get("connect_timeout", 0)) >= 0
        ports = re.fullmatch("[0-9,]*", dsn.get("port", ""))
        if not (limited and ports and scheme in ("postgresql", "postgres")):
            raise ValueError
    except (psycopg2.ProgrammingError, ValueError):
        return f"it must look like {URL}"
    # Poolers refuse or drop options. libpq would look up a service's host without a deadline.
    given = {"options", "service"} & dsn.keys() or env.get("PGOPTIONS") or env.get("PGSERVICE")
    fix = "instead of options, service, PGOPTIONS and PGSERVICE, use ALTER ROLE ... SET and a host"
    return fix if given else None
