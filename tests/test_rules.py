"""The rules and their promtool tests: they pass, and every rule has tests."""

import json
import re
import subprocess
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from testbed import ROOT
from testbed.service import Service

PROMETHEUS = ROOT / "prometheus"
GROUPS = [
    group
    for file in (PROMETHEUS / "rules").iterdir()
    for group in yaml.safe_load(file.read_text())["groups"]
]
RULES = [rule for group in GROUPS for rule in group["rules"]]
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}
RECORDS = {rule["record"]: rule for rule in RULES if "record" in rule}


@pytest.mark.needs("promtool", "amtool", "prometheus-blackbox-exporter")
def test_configuration_and_rules_pass_make_check_rules() -> None:
    done = subprocess.run(["make", "check-rules"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_promtool_tests() -> None:
    expected = defaultdict(list)
    files = [yaml.safe_load(file.read_text()) for file in (PROMETHEUS / "tests").iterdir()]
    for test in (test for file in files for test in file["tests"]):
        kind = test["name"].partition(":")[0]
        for check in test.get("alert_rule_test", []):
            expected[check["alertname"], kind].append("exp_alerts" in check)
    assert expected["Watchdog", "fires"] == [True]
    for alert in ALERTS.keys() - {"Watchdog"}:
        # Silent one evaluation before it fires.
        for kind in ("fires", "two replicas", "reset"):
            assert expected[alert, kind][:2] == [False, True], (alert, kind)
        assert expected[alert, "below"], alert
        assert not any(expected[alert, "below"]), alert
    assert sum("alert" in rule for rule in RULES) <= 32


def test_every_alert_has_a_severity_and_a_runbook_section() -> None:
    runbook = (ROOT / "docs/runbook.md").read_text()
    sections = dict(re.findall(r"^## (\w+)\n\n(.*?)(?=\n\n#)", runbook, re.MULTILINE | re.DOTALL))
    assert sections.keys() == ALERTS.keys()
    for name, rule in ALERTS.items():
        assert rule["labels"].keys() == {"severity", "service"}
        assert rule["annotations"].keys() == {"summary", "description", "runbook_url"}
        assert rule["annotations"]["runbook_url"] == f"docs/runbook.md#{name.lower()}"
        assert sections[name].startswith("First"), name
        assert sections[name].rpartition("\n- ")[2].startswith("Over: "), name


def test_rules_read_only_exposed_metrics_and_labels(service: Service) -> None:
    """An alert on anything else could never fire."""
    samples = service.metrics()
    names = {name for name, _ in samples}
    values = {value for _, labels in samples for value in dict(labels).values()}
    for rule in RULES:
        for name in re.findall(r"\b(?:signup|database|process)_\w+(?=[{\[)])", rule["expr"]):
            assert name in names, (rule, name)
        for record in re.findall(r"\w+:\w+:\w+", rule["expr"]):
            assert record in RECORDS, (rule, record)
        for value in re.findall(r'\b(?:status_code|error_type|state|le)="(.*?)"', rule["expr"]):
            assert value in values, (rule, value)
    text = (ROOT / "nginx/process.conf").read_text()
    processes, connections = re.findall(r"worker_(?:processes|connections) (\d+);", text)
    expr = RECORDS["job:nginx_connections_active:ratio"]["expr"]
    assert expr.strip().endswith(f"/ {int(processes) * int(connections)}")


@pytest.mark.needs("promtool")
def test_metric_names_pass_promtool(service: Service) -> None:
    command, page = ["promtool", "check", "metrics"], service.get("/metrics").text
    done = subprocess.run(command, input=page, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


SCENES = yaml.safe_load((ROOT / "tests/scenes.yml").read_text())
FIRING = 'ALERTS{alertstate="firing", alertname!="Watchdog"}'
PLACED = 'count by (alertname, severity, at) (label_join(%s, "at", "", "instance", "cluster"))'


def labels_of(series: str) -> set[tuple[str, str]]:
    return {("__name__", series.partition("{")[0]), *re.findall(r'(\w+)="(.*?)"', series)}


def to_promtool(scene: dict[str, Any], exposed: dict[Any, float]) -> dict[str, Any]:
    """Return the scene in promtool's format, with the series that the service exposes."""
    series: dict[str, Any] = {}
    for place in scene["replicas"]:
        series |= {s.replace("REPLICA", place): v for s, v in SCENES["background"].items()}
        for (name, labels), value in exposed.items():
            own = "".join(f', {label}="{text}"' for label, text in labels)
            series[f'{name}{{job="signup-server", {place}{own}}}'] = value
    series = {name: f"{value}x{scene['samples']}" for name, value in series.items()}
    for selector, text in scene["series"].items():
        job = set() if "job=" in selector else {("job", "signup-server")}
        found = [name for name in series if labels_of(selector) | job <= labels_of(name)]
        series |= dict.fromkeys(found or [selector], text)
    expr = PLACED % (f"last_over_time({FIRING}[1d])" if "never" in scene else FIRING)
    checks = []
    for time, alerts in scene["fires"].items():
        form = r'{alertname="\1", severity="\2", at="\3"}'
        labels = [re.sub(r"^(\S+) (\S+) ?(.*)", form, a).replace(', at=""', "") for a in alerts]
        samples = [{"labels": each, "value": 1} for each in labels]
        checks.append({"eval_time": time, "expr": expr, "exp_samples": samples})
    inputs = [{"series": name, "values": text} for name, text in series.items()]
    return {"interval": scene["interval"], "input_series": inputs, "promql_expr_test": checks}


@pytest.mark.needs("promtool")
@pytest.mark.parametrize("scene", SCENES["scenes"], ids=lambda scene: scene["name"])
def test_scene(scene: dict[str, Any], service: Service, tmp_path: Path) -> None:
    scene = {"interval": "15s", "replicas": ['instance="a"', 'instance="b"']} | scene
    content = {
        "rule_files": [str(file) for file in (PROMETHEUS / "rules").iterdir()],
        "evaluation_interval": scene["interval"],
        "group_eval_order": sorted((g["name"] for g in GROUPS), key=lambda name: "alerts" in name),
        "tests": [to_promtool(scene, service.metrics())],
    }
    file = tmp_path / "test.yml"
    file.write_text(json.dumps(content))
    done = subprocess.run(["promtool", "test", "rules", file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
