"""Configuration: environment variables, read once and checked at start."""

import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from psycopg2 import ProgrammingError
from psycopg2.extensions import parse_dsn

LOG_LEVELS = ("debug", "info", "warning", "error", "critical")

T = TypeVar("T")
Number = TypeVar("Number", int, float)


class ConfigError(ValueError):
    """One line for each mistake: the variable, its value, and what is allowed."""


@dataclass(frozen=True)
class Config:
    """The settings of one service; README.md has the table of them."""

    port: int
    database_url: str | None  # None: gunicorn.conf.py starts an embedded PostgreSQL
    database_max_connections: int  # for the whole service, shared out over the workers
    database_pool_timeout: float  # seconds a request waits for a connection
    database_statement_timeout: float  # seconds
    metrics_sample_interval: float  # seconds between two looks at the pool
    max_body_bytes: int
    workers: int
    threads: int  # greenlets of each worker that answer a request
    log_level: str
    metrics_dir: Path | None  # None: gunicorn.conf.py makes a private one

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ) -> "Config":
        """Read every variable; one that is unset or empty has its default.

        Raises ConfigError, which holds a line for each variable that is wrong.
        """
        mistakes: list[str] = []

        def read(name: str, default: T, parse: Callable[[str], T], allowed: str) -> T:
            text = env.get(name, "").strip()
            if not text:
                return default
            try:
                return parse(text)
            except ValueError:
                mistakes.append(f"{name}: {_redact(text)!r} is not allowed: {allowed}")
                return default

        def whole(name: str, default: int, low: int, high: int) -> int:
            allowed = f"a whole number from {low} to {high}"
            return read(name, default, lambda text: _within(int(text), low, high), allowed)

        def seconds(name: str, default: float, low: float, high: float) -> float:
            allowed = f"seconds from {low:g} to {high:g}"
            return read(name, default, lambda text: _within(float(text), low, high), allowed)

        max_connections = whole("DATABASE_MAX_CONNECTIONS", 25, 1, 10_000)
        cores = len(os.sched_getaffinity(0))
        config = cls(
            port=whole("PORT", 3000, 1, 65535),
            database_url=read(
                "DATABASE_URL", None, _database_url, "postgresql://user:password@host:port/database"
            ),
            database_max_connections=max_connections,
            database_pool_timeout=seconds("DATABASE_POOL_TIMEOUT", 5.0, 0.01, 60),
            database_statement_timeout=seconds("DATABASE_STATEMENT_TIMEOUT", 5.0, 0.01, 60),
            metrics_sample_interval=seconds("METRICS_SAMPLE_INTERVAL", 1.0, 0.01, 60),
            max_body_bytes=whole("MAX_BODY_BYTES", 16384, 1, 2**20),
            workers=whole("WEB_CONCURRENCY", min(max(2, cores), max_connections), 1, 256),
            threads=whole("WEB_THREADS", 128, 1, 1000),
            log_level=read(
                "LOG_LEVEL",
                "info",
                lambda text: LOG_LEVELS[LOG_LEVELS.index(text.lower())],
                f"one of {', '.join(LOG_LEVELS)}",
            ),
            metrics_dir=read("PROMETHEUS_MULTIPROC_DIR", None, Path, "a folder"),
        )
        if not mistakes and config.workers > config.database_max_connections:
            mistakes.append(
                f"WEB_CONCURRENCY: '{config.workers}' is not allowed: at most "
                f"DATABASE_MAX_CONNECTIONS ({config.database_max_connections}), "
                "since each worker needs a connection"
            )
        if mistakes:
            raise ConfigError("\n".join(mistakes))
        return config


def _within(value: Number, low: Number, high: Number) -> Number:
    if not (math.isfinite(value) and low <= value <= high):
        raise ValueError
    return value


def _database_url(text: str) -> str:
    if not text.startswith(("postgresql://", "postgres://")):
        raise ValueError
    try:
        parse_dsn(text)
    except ProgrammingError as error:  # its message may quote the password
        raise ValueError from error
    return text


def _redact(text: str) -> str:
    """`text` without the password that a database URL may hold."""
    text = re.sub(r"(://[^:/?#]*:).*@", r"\1***@", text)
    return re.sub(r"(?i)(password\s*=\s*)[^&\s]*", r"\1***", text)
