"""SignupHighErrorRate on days of Poisson-distributed signups, against docs/runbook.md."""

import json
import random
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from testbed import ROOT

RULES = ROOT / "prometheus/rules"
SCRAPES = 24 * 60 * 4  # per day
Row = tuple[int, int]  # signups per day, bad signups in percent
# Signups per day, bad signups in percent, and warnings per day.
RUNBOOK = (ROOT / "docs/runbook.md").read_text().replace(",", "")
TABLE = re.findall(r"^\| (\d+) \| (\d+) % \| (\d+) \|$", RUNBOOK, re.MULTILINE)
EXPECTED: dict[Row, int] = {(int(n), int(share)): int(count) for n, share, count in TABLE}
ALERT = 'ALERTS{alertstate="firing", severity="warning", job=~"signup-server-.+"}'
PAGE = {"record": "page", "expr": f"{ALERT} unless {ALERT} offset 1m"}


def counters(row: Row) -> Iterator[tuple[int, int]]:
    """Yield the counters of good and bad signups at each scrape of a day, the same on each call."""
    signups, share = row
    chance = random.Random(f"{signups} {share}")
    good = bad = 0
    next_one = chance.expovariate(signups / SCRAPES)
    for scrape in range(SCRAPES):
        yield good, bad
        while next_one < scrape + 1:
            if chance.random() < share / 100:
                bad += 1
            else:
                good += 1
            next_one += chance.expovariate(signups / SCRAPES)


def pages(folder: Path) -> dict[Row, int]:
    """Return how often the warning starts to fire within each row's day.

    The rules are evaluated every minute, in production every 15 s. Conditions that have to last
    5 minutes therefore page somewhat more often here.
    """
    (group,) = yaml.safe_load((RULES / "alerts.yml").read_text())["groups"]
    group["rules"] = [r for r in group["rules"] if r["alert"] == "SignupHighErrorRate"]
    rules = {"groups": [group, {"name": "pages", "rules": [PAGE]}]}
    (folder / "rules.yml").write_text(json.dumps(rules))
    series = []
    for signups, share in EXPECTED:
        good, bad = (" ".join(map(str, c)) for c in zip(*counters((signups, share)), strict=True))
        job = f'job="signup-server-{signups}-{share}"'
        series += [
            {"series": f'signup_requests_total{{{job}, status_code="201"}}', "values": good},
            {"series": f'signup_requests_total{{{job}, status_code="400"}}', "values": bad},
            {"series": f'signup_errors_total{{{job}, error_type="validation"}}', "values": bad},
            {"series": f"up{{{job}}}", "values": f"1x{SCRAPES}"},
        ]
    query = {
        "eval_time": "1d",
        "expr": "sum by (job) (count_over_time(page[1d]))",
        "exp_samples": [{"labels": "{}", "value": -1}],  # so that promtool prints the result
    }
    test = {
        "rule_files": [str(RULES / "recording.yml"), "rules.yml"],
        "evaluation_interval": "1m",
        "group_eval_order": ["signup.rules", "signup.alerts", "pages"],
        "tests": [{"interval": "15s", "input_series": series, "promql_expr_test": [query]}],
    }
    file = folder / "test.yml"
    file.write_text(json.dumps(test))
    done = subprocess.run(["promtool", "test", "rules", file], capture_output=True, text=True)
    (got,) = re.findall(r"got: (.*)", done.stdout + done.stderr)
    found = re.findall(r'{job="signup-server-(\d+)-(\d+)"} ([\d.E+]+)', got)
    return dict.fromkeys(EXPECTED, 0) | {(int(n), int(s)): int(float(v)) for n, s, v in found}


@pytest.mark.needs("promtool")
def test_pages_per_day_match_the_runbook(tmp_path: Path) -> None:
    assert pages(tmp_path) == EXPECTED
    # A success rate above 95 %, the green range of the dashboards, never fires.
    assert {count for (_, share), count in EXPECTED.items() if share < 5} == {0}
    assert {*EXPECTED} >= {(n, share) for n in (100, 1_000, 10_000) for share in (3, 5, 10)}
