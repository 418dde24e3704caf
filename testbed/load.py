"""Background load during a `with` block: clients that sign up, scrapers, and other actions."""

import itertools
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import NamedTuple, Self

import psycopg2
import requests

from . import wait_until
from .service import USER, Client, Samples


class Background(ABC):
    """Threads that repeat `step` until the block ends, which then raises their first error."""

    def __init__(self, threads: int) -> None:
        self._threads, self._stop = threads, threading.Event()

    def __enter__(self) -> Self:
        self._executor = ThreadPoolExecutor(self._threads)
        self._runs = [self._executor.submit(self._run, n) for n in range(self._threads)]
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._executor.shutdown()
        for run in self._runs:
            run.result()

    def _run(self, number: int) -> None:
        with requests.Session() as session:
            for turn in itertools.takewhile(lambda _: not self._stop.is_set(), itertools.count()):
                self.step(session, number, turn)

    @abstractmethod
    def step(self, session: requests.Session, number: int, turn: int) -> None:
        """Do one iteration; thread `number` and iteration `turn` count from 0."""


class Repeated(Background):
    """A thread that repeats `action`."""

    def __init__(self, action: Callable[[], object]) -> None:
        super().__init__(1)
        self._action = action

    def step(self, session: requests.Session, number: int, turn: int) -> None:
        self._action()


class Answer(NamedTuple):
    """What a client got for a signup. The times are those of `time.monotonic`."""

    sent: float
    done: float
    status: int | str  # or the error that came instead of a response
    email: str


class Signups(Background):
    """Signups over keep-alive connections: of ten, eight are new, one invalid, one a duplicate.

    If `valid`, all are new. The emails start with `name`, which is unique by default.
    """

    def __init__(
        self, service: Client, clients: int = 8, name: str = "", valid: bool = False
    ) -> None:
        super().__init__(clients)
        self._service, self._valid = service, valid
        self._name = name or f"{time.monotonic_ns()}"
        self.answers: list[Answer] = []  # what the clients got so far

    def step(self, session: requests.Session, number: int, turn: int) -> None:
        kind = 0 if self._valid else turn % 10
        email = f"{self._name}-{number}-{turn - (kind == 9)}@example.com"
        if self.sign_up("bad" if kind == 5 else email, session).status not in (201, 400, 409):
            self._stop.wait(0.05)  # back off after a failure

    def sign_up(self, email: str, session: requests.Session | None = None) -> Answer:
        """Send a signup, by default over a new connection."""
        sent = time.monotonic()
        status: int | str
        try:
            status = self.send(email, session)
        except (requests.RequestException, psycopg2.Error) as error:
            status = repr(error)
        self.answers.append(Answer(sent, time.monotonic(), status, email))
        return self.answers[-1]

    def send(self, email: str, session: requests.Session | None) -> int:
        """Send a request and return the status of its response, which must be JSON."""
        response = self._service.signup(session=session, json=USER | {"email": email})
        assert response.headers["Content-Type"] == "application/json", response.text
        response.json()
        return response.status_code

    def await_answers(self, count: int, status: int = 201) -> None:
        """Wait for `count` responses with `status` to requests sent from now on."""
        now = time.monotonic()

        def sent_since() -> int:
            return sum(a.status == status for a in self.answers if a.sent > now)

        wait_until(lambda: sent_since() >= count, timeout=60)

    @property
    def acknowledged(self) -> list[str]:
        """The emails that got a 201."""
        return [answer.email for answer in self.answers if answer.status == 201]

    @property
    def unanswered(self) -> Counter[str]:
        """The number of requests without a response, by error."""
        return Counter(answer.status for answer in self.answers if isinstance(answer.status, str))

    @property
    def slowest(self) -> float:
        """The longest time until a response, in seconds."""
        return max(a.done - a.sent for a in self.answers if isinstance(a.status, int))


class Scraper(Background):
    """Scrapes over new connections: each must parse, and no counter may decrease.

    `count` is the number of complete scrapes, `unanswered` of those whose worker was killed, and
    `failed` of those that got an error.
    """

    def __init__(self, service: Client, scrapers: int = 1) -> None:
        super().__init__(scrapers)
        self._service = service
        self._last: dict[int, Samples] = {}
        self.count = self.unanswered = self.failed = 0

    def step(self, session: requests.Session, number: int, turn: int) -> None:
        try:
            samples = self._service.metrics(openmetrics=turn % 2 == 1)
        except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError):
            self.unanswered += 1
            return
        except requests.HTTPError:
            self.failed += 1
            return
        for key, value in self._last.get(number, Samples()).items():
            if key[0].endswith(("_total", "_count", "_bucket", "_sum")):
                assert samples[key] >= value, (key, value, samples[key])
        self._last[number] = samples
        self.count += 1
        self._stop.wait(0.1)  # parsing takes the CPU time that the service needs


def scrape_time(service: Client, times: int = 50) -> float:
    """Return the median duration of a scrape in seconds, over one keep-alive connection."""
    durations = []
    with requests.Session() as session:
        for _ in range(times):
            started = time.perf_counter()
            session.get(service.url + "/metrics", timeout=30).raise_for_status()
            durations.append(time.perf_counter() - started)
    return median(durations)
