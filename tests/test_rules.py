"""The rules and their promtool tests: they pass, and every rule has tests."""

import re
import subprocess
from collections import defaultdict

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
TESTS = [
    test | {"evaluation_interval": content["evaluation_interval"]}
    for content in (yaml.safe_load(f.read_text()) for f in (PROMETHEUS / "tests").iterdir())
    for test in content["tests"]
]


def seconds(duration: str) -> int:
    units: dict[str, int] = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    return sum(int(n) * units[unit] for n, unit in re.findall(r"(\d+)([smhd])", duration))


@pytest.mark.needs("promtool", "amtool", "prometheus-blackbox-exporter")
def test_configuration_and_rules_pass_make_check_rules() -> None:
    done = subprocess.run(["make", "check-rules"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_promtool_tests() -> None:
    expected = defaultdict(list)
    for test in TESTS:
        kind = test["name"].partition(":")[0]
        checks = test.get("alert_rule_test", [])
        for check in checks:
            expected[check["alertname"], kind].append("exp_alerts" in check)
        if kind in {"fires", "two replicas", "reset"} and checks and "Watchdog" not in test["name"]:
            silent, firing = (seconds(check["eval_time"]) for check in checks)
            assert firing - silent == seconds(test["evaluation_interval"]), test["name"]
    assert expected["Watchdog", "fires"] == [True]
    for alert in ALERTS.keys() - {"Watchdog"}:
        # Silent one evaluation before its `for` has passed, then firing.
        for kind in ("fires", "two replicas", "reset"):
            assert expected[alert, kind][:2] == [False, True], (alert, kind)
        assert expected[alert, "below"], alert
        assert not any(expected[alert, "below"]), alert
        assert "for" in ALERTS[alert]
    # No alert fires without traffic, or when healthy replicas restart.
    for name in ("idle: no traffic at all", "reset: healthy traffic, and both replicas restart"):
        (test,) = (test for test in TESTS if test["name"] == name)
        of_alerts = [t for t in test["promql_expr_test"] if "ALERTS" in t["expr"]]
        assert [t.get("exp_samples") for t in of_alerts] == [None]


def test_every_recording_rule_has_a_value_test() -> None:
    tested = {
        name
        for test in TESTS
        for check in test.get("promql_expr_test", [])
        if any(sample["value"] for sample in check.get("exp_samples", []))
        for name in re.findall(r"\w+:\w+:\w+", check["expr"])
    }
    assert tested == RECORDS.keys()


def test_every_alert_has_a_severity_and_a_runbook_section() -> None:
    headings = re.findall(r"^#+ (.*)$", (ROOT / "docs/runbook.md").read_text(), re.MULTILINE)
    for name, rule in ALERTS.items():
        assert rule["labels"].keys() == {"severity", "service"}
        assert rule["annotations"].keys() == {"summary", "description", "runbook_url"}
        assert rule["annotations"]["runbook_url"] == f"docs/runbook.md#{name.lower()}"
        assert name in headings


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
    # The number of metrics that SignupMetricsMissing expects.
    own = {name for name in names if name.startswith(("signup_", "database_"))}
    assert f">= {len(own)}" in ALERTS["SignupMetricsMissing"]["expr"]


@pytest.mark.needs("promtool")
def test_metric_names_pass_promtool(service: Service) -> None:
    command, page = ["promtool", "check", "metrics"], service.get("/metrics").text
    done = subprocess.run(command, input=page, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.needs("amtool")
def test_each_severity_is_routed_to_its_receiver() -> None:
    receivers = {"critical": "page", "warning": "ticket", "info": "info", "none": "watchdog"}
    config = f"--config.file={PROMETHEUS / 'alertmanager.yml'}"
    command = ["amtool", "config", "routes", "test", config, "job=signup-server"]
    for alert, rule in ALERTS.items():
        labels = [f"{name}={value}" for name, value in rule["labels"].items()]
        found = subprocess.check_output([*command, f"alertname={alert}", *labels], text=True)
        assert found.strip() == receivers[rule["labels"]["severity"]], alert
