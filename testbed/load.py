"""Background load during a `with` block: clients that sign up, scrapers, and other actions."""

import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from statistics import median
from typing import NamedTuple, Self

import requests

from .service import USER, Client, Samples


class Background(ABC):
    """Threads that repeat `step` until the block ends, which then raises their first error."""

    def __init__(self, threads: int) -> None:
        self._stop = threading.Event()
        self._errors: list[BaseException] = []
        self._threads = [threading.Thread(target=self._run, args=(n,)) for n in range(threads)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        if self._errors:
            raise self._errors[0]

    def _run(self, number: int) -> None:
        try:
            with requests.Session() as session:
                for turn in range(10**9):
                    if self._stop.is_set():
                        return
                    self.step(session, number, turn)
        except BaseException as error:
            self._errors.append(error)

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
    """Signups over keep-alive connections: of ten, eight are new, one invalid, one a duplicate."""

    def __init__(self, service: Client, clients: int = 8, name: str = "load") -> None:
        super().__init__(clients)
        self._service = service
        self._name = name
        self._answers: list[Answer] = []

    def step(self, session: requests.Session, number: int, turn: int) -> None:
        email = f"{self._name}-{number}-{turn - (turn % 10 == 9)}@example.com"
        self.sign_up("bad" if turn % 10 == 5 else email, session)

    def sign_up(self, email: str, session: requests.Session | None = None) -> Answer:
        """Send a signup, by default over a new connection; any response must be JSON."""
        sent = time.monotonic()
        status: int | str
        try:
            response = self._service.signup(session=session, json=USER | {"email": email})
            assert response.headers["Content-Type"] == "application/json", response.text
            response.json()
            status = response.status_code
        except requests.RequestException as error:
            status = repr(error)
        self._answers.append(Answer(sent, time.monotonic(), status, email))
        return self._answers[-1]

    @property
    def answers(self) -> list[Answer]:
        """What the clients got so far."""
        return self._answers.copy()

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


def scrape_time(service: Client, times: int = 50) -> float:
    """Return the median duration of a scrape in seconds, over one keep-alive connection."""
    durations = []
    with requests.Session() as session:
        for _ in range(times):
            started = time.perf_counter()
            session.get(service.url + "/metrics", timeout=30).raise_for_status()
            durations.append(time.perf_counter() - started)
    return median(durations)
