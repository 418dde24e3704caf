"""The dashboards: Grafana's types, the required panels, and every query on real data."""

import configparser
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard
from matplotlib.image import imread

from drills.previews import ROW, WIDTH, ask, draw, with_defaults
from testbed import ROOT
from testbed.watched import CODES, CONTAINERS, MISUSE, SIGNUPS, TODAY, WAITING, Watched, quantile

GRAFANA = ROOT / "grafana"
DASHBOARDS = {
    file.stem: json.loads(file.read_text()) for file in sorted((GRAFANA / "dashboards").iterdir())
}
PANELS = {
    (name, panel["title"]): panel
    for name, dashboard in DASHBOARDS.items()
    for panel in dashboard["panels"]
}
RULES = "".join(file.read_text() for file in (ROOT / "prometheus/rules").iterdir())
ALERTS = set(re.findall(r"- alert: (\w+)", RULES))
# The required panels: type, and the colours, each with the value at which it starts.
REQUIRED = {
    ("overview", "Signups/sec"): ("stat", ""),
    ("overview", "Success Rate"): ("stat", "red, yellow 90, green 95"),
    ("overview", "p95 Latency"): ("stat", "green, yellow 0.5, red 1"),
    ("overview", "Error Rate"): ("stat", "green, red 5"),
    ("overview", "Total Signups Today"): ("stat", ""),
    ("overview", "Connection Pool Usage"): ("gauge", "green, yellow 72, red 80"),
    ("traffic", "Requests by Status Code"): ("timeseries", ""),
    ("traffic", "Latency Percentiles"): ("timeseries", "green, yellow 0.5, red 1"),
    ("traffic", "Error Breakdown"): ("piechart", ""),
    ("traffic", "Database Query Time"): ("timeseries", "green, yellow 0.1, red 0.5"),
    ("traffic", "Validation Errors by Field"): ("barchart", ""),
    ("capacity", "CPU Usage"): ("timeseries", "green, red 80"),
    ("capacity", "Memory Usage"): ("timeseries", ""),
    ("capacity", "Database Connections"): ("timeseries", ""),
    ("capacity", "Requests/Minute Trend"): ("timeseries", ""),
    ("capacity", "Progress to the Signup Goal"): ("bargauge", ""),
}


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the path and value of every scalar."""
    if not isinstance(value, dict | list):
        yield path, value
        return
    for key, child in value.items() if isinstance(value, dict) else enumerate(value):
        yield from leaves(child, f"{path}.{key}")


@pytest.mark.parametrize("name", DASHBOARDS)
def test_grafanas_types_keep_every_value(name: str) -> None:
    register_default_plugins()
    typed = Dashboard.from_json(DASHBOARDS[name])
    back = json.loads(JSONEncoder().encode(typed))
    assert set(leaves(DASHBOARDS[name])) <= set(leaves(back))


@pytest.mark.parametrize("name", DASHBOARDS)
def test_panels_have_a_description_unit_legend_and_job_selector(name: str) -> None:
    dashboard = DASHBOARDS[name]
    assert dashboard["description"]
    for panel in dashboard["panels"]:
        title = panel["title"]
        assert len(panel["description"]) > 20, title
        assert ALERTS.issuperset(re.findall(r"Signup[A-Z]\w+", panel["description"])), title
        defaults = panel["fieldConfig"]["defaults"]
        assert "unit" in defaults or panel["type"] == "table", title
        for target in panel["targets"]:
            # A series is shown by a name, not by all of its labels.
            assert target["legendFormat"] or panel["type"] == "table", title
            names = re.findall(
                r"\b((?:signup|database|process|scrape)_\w+|up|job:\w+:\w+)\b(?!\.)({.*?})?",
                target["expr"],
            )
            for name, labels in names:
                assert 'job="$job", namespace="$namespace"' in labels, title
                assert "$instance" in labels or ":" in name, title
            containers = re.findall(r"container_\w+({.*?})", target["expr"])
            assert all('job="cadvisor"' in labels for labels in containers), title
            assert names or containers or "ALERTS" in target["expr"], title


def test_ids_and_titles_are_unique_and_panels_do_not_overlap() -> None:
    for key in ("uid", "title"):
        assert len({dashboard[key] for dashboard in DASHBOARDS.values()}) == len(DASHBOARDS)
    for name, dashboard in DASHBOARDS.items():
        panels = dashboard["panels"]
        assert len({p["id"] for p in panels}) == len({p["title"] for p in panels}) == len(panels)
        taken: Counter[tuple[int, int]] = Counter()
        for panel in panels:
            x, y, w, h = (panel["gridPos"][k] for k in "xywh")
            assert w >= 4  # 200 of 1280 pixels
            taken.update(product(range(x, x + w), range(y, y + h)))
        assert max(taken.values()) == 1, name
        assert max(column for column, _ in taken) < 24


def test_dashboards_share_tag_link_and_variables() -> None:
    for dashboard in DASHBOARDS.values():
        assert dashboard["tags"] == ["signup"]
        (link,) = dashboard["links"]
        assert (link["type"], link["tags"]) == ("dashboards", ["signup"])
        variables = {v["name"]: v for v in dashboard["templating"]["list"]}
        assert list(variables)[:4] == ["datasource", "job", "namespace", "instance"]
        # For provisioning, which knows no __inputs, and for an import into anybody's Grafana.
        assert dashboard["editable"] and "__inputs" not in dashboard
        assert {v for p, v in leaves(dashboard) if p.endswith("source.uid")} == {"${datasource}"}
        assert variables["datasource"]["current"]["value"] == "default"
        assert variables["datasource"]["query"] == "prometheus"
        # Single choice, so that series of two jobs never mix.
        for name, many in (("job", False), ("namespace", False), ("instance", True)):
            assert variables[name]["multi"] == variables[name]["includeAll"] == many


def test_required_panels_have_their_types_and_thresholds() -> None:
    for key, (kind, steps) in REQUIRED.items():
        panel = PANELS[key]
        assert panel["type"] == kind, key
        if steps:
            found = [
                step["color"] if step["value"] is None else f"{step['color']} {step['value']}"
                for step in panel["fieldConfig"]["defaults"]["thresholds"]["steps"]
            ]
            assert ", ".join(found) == steps, key
    for title in ("Requests by Status Code", "Database Connections"):
        (panel,) = (p for (name, t), p in PANELS.items() if t == title and name != "overview")
        assert panel["fieldConfig"]["defaults"]["custom"]["stacking"]["mode"] == "normal"


def test_provisioning_matches_the_dashboards_and_prometheus() -> None:
    def read(path: str) -> Any:
        content = yaml.safe_load((ROOT / path).read_text())
        assert content.pop("apiVersion", 1) == 1
        return content

    prometheus, alertmanager = read("grafana/provisioning/datasources/signup.yml")["datasources"]
    (provider,) = read("grafana/provisioning/dashboards/signup.yml")["providers"]
    config = read("prometheus/prometheus.yml")
    (target,) = config["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"]
    assert alertmanager["url"] == f"http://{target}"
    assert prometheus["isDefault"] and not provider["allowUiUpdates"]
    assert prometheus["jsonData"]["timeInterval"] == config["global"]["scrape_interval"]
    for dashboard in DASHBOARDS.values():
        assert dashboard["refresh"] == prometheus["jsonData"]["timeInterval"]
    settings = configparser.ConfigParser()
    settings.read(GRAFANA / "grafana.ini")
    home = settings["dashboards"]["default_home_dashboard_path"]
    assert home == f"{provider['options']['path']}/overview.json"


def run(watched: Watched, target: dict[str, Any], time: float) -> dict[str, list[float]]:
    """Return what the panel shows: values at `time`, or of the minute before it."""
    series = ask(watched.prometheus, time - 60, time, rate_interval="1m")(target)
    return {name: [value for _, value in samples] for name, samples in series.items()}


TARGETS = [
    pytest.param(panel, target, id=f"{name}-{panel['title']}-{target['refId']}")
    for (name, _), panel in PANELS.items()
    for target in panel["targets"]
]


@pytest.mark.needs("prometheus", "promtool")
@pytest.mark.parametrize(("panel", "target"), TARGETS)
def test_queries_have_data_or_idle_panels_a_text(
    panel: dict[str, Any], target: dict[str, Any], watched: Watched
) -> None:
    no_value = panel["fieldConfig"]["defaults"].get("noValue")
    times = (watched.now - 3600, watched.idle, watched.now)
    past, idle, busy = (run(watched, target, time) for time in times)
    values = [value for result in (idle, busy) for each in result.values() for value in each]
    assert all(map(math.isfinite, values))
    if "container_" in target["expr"]:
        assert past.keys() == {*CONTAINERS}
    if str(no_value).startswith("Needs"):
        assert past and not busy
    else:
        assert busy and all(busy.values())
        assert idle or no_value in {"No traffic yet", "No alert is firing"}


@pytest.mark.needs("prometheus", "promtool")
def test_restart_is_annotated_for_one_minute(watched: Watched) -> None:
    for dashboard in DASHBOARDS.values():
        (restarts,) = dashboard["annotations"]["list"]
        query = with_defaults(restarts["expr"])
        (seconds_left,) = watched.prometheus.query(query, watched.idle).values()
        assert 0 < seconds_left < 60
        assert not watched.prometheus.query(query, watched.idle + 60)


@pytest.mark.needs("prometheus", "promtool")
def test_single_value_panels_match_the_traffic_sent(watched: Watched) -> None:
    name, codes = "signup_request_duration_seconds", "|".join(CODES.keys() - {"405"})
    answered = [code for code in CODES if code[0] != "5" and code != "405"]
    done = sum(watched.samples.total(f"{name}_count", status_code=code) for code in answered)
    fast = [watched.samples.total(f"{name}_bucket", status_code=c, le="0.5") for c in answered]
    expected = {
        "Signups/sec": CODES["201"] / 60,
        "Success Rate": 100 * CODES["201"] / (SIGNUPS + MISUSE),
        "p95 Latency": quantile(watched.samples, 0.95, name, status_code=codes),
        "Error Rate": 100 * (1 - CODES["201"] / (SIGNUPS + MISUSE)),
        "Total Signups Today": TODAY,
        "Connection Pool Usage": WAITING * 4,
        "Availability Budget Left": 100 * (1 - CODES["500"] / SIGNUPS / 0.001),
        "Latency Budget Left": 100 * (1 - (1 - sum(fast) / done) / 0.01),
        "Requests in Flight": WAITING,
        "Replicas Up": 1,
        "Workers": 4,
        "Progress to the Signup Goal": TODAY / 10,
        "Pool Timeouts (1 h)": 0,
        "Worker Starts (10 min)": 0,
    }
    values = {
        panel["title"]: run(watched, panel["targets"][0], watched.now)
        for panel in PANELS.values()
        if panel["type"] in {"stat", "gauge", "bargauge"}
    }
    single = {title: values[0] for title, result in values.items() for values in result.values()}
    assert single.pop("Firing Alerts") >= 1
    assert single.pop("Pool Churn (5 min)") >= 2  # opened, then closed by the fault
    assert single == pytest.approx(expected, rel=0.05)


@pytest.mark.needs("prometheus", "promtool")
@pytest.mark.parametrize("name", DASHBOARDS)
def test_previews_have_the_size_of_the_dashboards(
    name: str, watched: Watched, tmp_path: Path
) -> None:
    query = ask(watched.prometheus, watched.now - 60, watched.now, rate_interval="1m")
    draw(DASHBOARDS[name], query, tmp_path / "preview.png")
    rows = max(p["gridPos"]["y"] + p["gridPos"]["h"] for p in DASHBOARDS[name]["panels"])
    for picture in (tmp_path / "preview.png", ROOT / f"docs/dashboard-{name}.png"):
        assert imread(picture).shape[:2] == ((rows + 1) * ROW, WIDTH)
