"""Peer (c): this service with its metrics off, to show what they cost."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from signup import create_app, metrics


class Nothing:
    """A metric that counts nothing, and a set of such metrics."""

    def __getattr__(self, name: str) -> "Nothing":
        return self

    def __getitem__(self, label: Any) -> "Nothing":
        return self

    def __call__(self, *_: Any, **__: Any) -> "Nothing":
        return self

    def time(self) -> AbstractContextManager[None]:
        return nullcontext()


setattr(metrics, "Metrics", Nothing())  # noqa: B010 (mypy)
setattr(metrics, "init_app", lambda app, measured: None)  # noqa: B010
app = create_app()
