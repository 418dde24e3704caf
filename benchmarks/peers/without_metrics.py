"""Peer (c): this service without its metrics, to measure their cost."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from flask import Response

from signup import create_app, metrics


class NullMetric:
    """A metric that records nothing, or a set of such metrics."""

    def __getattr__(self, name: str) -> "NullMetric":
        return self

    def __getitem__(self, label: Any) -> "NullMetric":
        return self

    def __call__(self, *_: Any, **__: Any) -> "NullMetric":
        return self

    def time(self) -> AbstractContextManager[None]:
        return nullcontext()

    track_inprogress = time


class NullMetrics(NullMetric):
    def start(self) -> None:
        pass

    def finish(self, response: Response) -> Response:
        return response

    def expose(self) -> Response:
        return Response()


setattr(metrics, "Metrics", lambda _: NullMetrics())  # noqa: B010 (mypy)
app = create_app()
