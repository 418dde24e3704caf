"""Load tests with Locust: `make load-test-smoke`, `make load-test`, `make load-test-stress`.

LOAD selects the plan, and SECONDS overrides its duration. Users send valid signups, duplicates and
invalid requests; the response that the API specifies for each is a success. The test fails if a
threshold is missed, or if the server's counters differ from Locust's.
"""

import itertools
import os
import time
from collections import Counter
from contextlib import suppress
from typing import Any, NamedTuple

import requests
from locust import FastHttpUser, LoadTestShape, between, events, task
from locust.env import Environment

from testbed.service import USER, Client


class Plan(NamedTuple):
    """User counts, one after another over `seconds` in total, and the thresholds."""

    users: tuple[int, ...]
    seconds: float
    p95: float  # seconds
    failures: float  # share of all requests


PLANS = {
    "smoke": Plan((5,), 30, p95=1.0, failures=0.10),
    "load": Plan((10, 50, 100), 300, p95=0.5, failures=0.05),
    "stress": Plan((100, 250, 500, 1000), 600, p95=2.0, failures=0.30),
}
PLAN = PLANS[os.environ["LOAD"]]
SECONDS = float(os.environ.get("SECONDS") or PLAN.seconds)
RUN = f"load{time.time_ns()}"  # makes the emails unique to the run

numbers = itertools.count()
answers: Counter[str] = Counter()  # by status
before: Counter[str] = Counter()  # the server's, at the start


class Visitor(FastHttpUser):
    """A user who waits one to two seconds between requests."""

    wait_time = between(1, 2)
    last: str | None = None  # the email that was signed up last

    def send(self, name: str, expected: int, method: str = "POST", **options: Any) -> None:
        options |= {"name": name, "catch_response": True}
        with self.client.request(method, "/signup", **options) as response:
            if response.status_code:  # 0: no response, a failure for Locust
                answers[str(response.status_code)] += 1
            if response.status_code == expected:
                response.success()
            elif response.status_code:
                response.failure(f"{response.status_code} instead of {expected}")

    @task(70)
    def new(self) -> None:
        email = f"{RUN}-{next(numbers)}@example.com"
        self.send("signup", 201, json=USER | {"email": email})
        self.last = email

    @task(10)
    def again(self) -> None:
        if self.last:
            self.send("duplicate email", 409, json=USER | {"email": self.last.upper()})

    @task(10)
    def mistyped(self) -> None:
        self.send("invalid email", 400, json=USER | {"email": "ada.example.com"})

    @task(5)
    def incomplete(self) -> None:
        self.send("missing field", 400, json={"email": "ada@example.com"})

    @task(3)
    def malformed(self) -> None:
        self.send("invalid JSON", 400, data="{")

    @task(2)
    def wrong_method(self) -> None:
        self.send("wrong method", 405, method="GET")


class Steps(LoadTestShape):
    """Steps through the user counts of the plan, each for the same time."""

    def tick(self) -> tuple[int, float] | None:
        step = int(self.get_run_time() / SECONDS * len(PLAN.users))
        if step >= len(PLAN.users):
            return None
        return PLAN.users[step], max(5.0, PLAN.users[step] / 5)


def server_counts(host: str | None) -> Counter[str]:
    """Return the server's counters by status; none if `host` does not expose /metrics."""
    server, counts = Client(), Counter[str]()
    server.url = str(host)
    with suppress(requests.HTTPError):
        for (name, labels), count in server.metrics().items():
            if name == "signup_requests_total":
                counts[dict(labels)["status_code"]] = int(count)
    return counts


@events.test_start.add_listener
def start(environment: Environment, **_: Any) -> None:
    before.update(server_counts(environment.host))


@events.quitting.add_listener
def judge(environment: Environment, **_: Any) -> None:
    """Print whether the thresholds are met and the counters agree; set the exit status."""
    total = environment.stats.total
    p95 = total.get_response_time_percentile(0.95) / 1000
    failed = f"{total.fail_ratio:.2%} of {total.num_requests} requests failed"
    verdicts = [
        (p95 < PLAN.p95, f"p95 {p95:.3f} s, must be below {PLAN.p95:g} s"),
        (
            total.num_requests > 0 and total.fail_ratio < PLAN.failures,
            f"{failed}, must be below {PLAN.failures:.0%}",
        ),
    ]
    if after := server_counts(environment.host):
        after.subtract(before)
        counted = ", ".join(f"{n} x {code}" for code, n in after.items() if n)
        differ = sum(abs(n - answers[code]) for code, n in after.items())
        # The server may have counted a request that got no response.
        unanswered = total.num_requests - answers.total()
        text = f"the server counted {counted}; Locust differs by {differ}"
        verdicts.append((differ <= unanswered, text))
    else:
        print("the server's counters are not exposed at this HOST: not compared")
    for holds, text in verdicts:
        print("ok    " if holds else "FAILED", text)
    if not all(holds for holds, _ in verdicts):
        environment.process_exit_code = 1
