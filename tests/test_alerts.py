"""Alerts from a real cause through Prometheus to Alertmanager, and its inhibition."""

import re

import pytest
import requests

from drills.alerts import Deployment
from testbed import ROOT, wait_until
from testbed.monitoring import Alertmanager

from .test_rules import ALERTS

PAIRS = {  # a warning and the critical alert that inhibits it
    "SignupSlowLatency": "SignupVerySlowLatency",
    "SignupSlowDatabaseQueries": "SignupVerySlowDatabaseQueries",
    "SignupDatabaseConnectionsElevated": "SignupDatabaseConnectionsHigh",
    "SignupDatabaseErrors": "SignupHighServerErrors",
    "SignupAvailabilityBudgetBurnSlow": "SignupAvailabilityBudgetBurnFast",
    "SignupLatencyBudgetBurnSlow": "SignupLatencyBudgetBurnFast",
}


@pytest.mark.needs("prometheus", "prometheus-alertmanager", "prometheus-blackbox-exporter", "nginx")
def test_alerts_fire_with_their_cause_and_resolve_after_it() -> None:
    """A short `make alert-drill`."""
    with Deployment() as deployment:
        for cause, caused in {
            "database stopped": "SignupHighErrorRate SignupHighServerErrors SignupDatabaseErrors",
            "proxy stopped": "SignupUnreachable",
            "service stopped": "SignupServiceDown SignupUnreachable",
        }.items():
            deployment.run(cause, caused)
        wait_until(lambda: deployment.alertmanager.alerts().get("Watchdog") == "active")
        prometheus, alertmanager = deployment.prometheus, deployment.alertmanager
        # An alert on a metric that neither exposes would never fire.
        pages = [requests.get(f"{each.url}/metrics").text for each in (prometheus, alertmanager)]
        rules = (ROOT / "prometheus/rules/monitoring.yml").read_text()
        for name in re.findall(r"\b(?:prometheus|alertmanager)_\w+", rules):
            assert any(f"\n{name}" in page for page in pages), name
        alertmanager.stop()
        alerts = "PrometheusNotConnectedToAlertmanager|PrometheusNotificationsDropped"
        firing = f'group by (alertname) (ALERTS{{alertname=~"{alerts}", alertstate="firing"}})'
        wait_until(lambda: prometheus.query(firing).keys() == {*alerts.split("|")}, timeout=60)


@pytest.mark.needs("prometheus-alertmanager")
def test_redundant_alerts_are_inhibited() -> None:
    """A critical alert inhibits its warning; SignupServiceDown inhibits all others of its job."""
    alerts = {name: rule["labels"] for name, rule in ALERTS.items()}

    def post(*names: str, **labels: str) -> None:
        place = {"job": "signup-server", "namespace": "production"} | labels
        body = [{"labels": place | {"alertname": name} | alerts[name]} for name in names]
        requests.post(f"{alertmanager.url}/api/v2/alerts", json=body).raise_for_status()

    def suppressed() -> set[str]:
        """Return the names of the suppressed alerts in production."""
        found = alertmanager.get("/api/v2/alerts", filter='namespace="production"')
        return {a["labels"]["alertname"] for a in found if a["status"]["state"] == "suppressed"}

    others = {name for name in alerts if alerts[name]["service"] == "signup"}
    others.remove("SignupServiceDown")
    with Alertmanager() as alertmanager:
        post(*PAIRS)
        post(*PAIRS.values(), "SignupServiceDown", namespace="staging")
        post(*PAIRS.values(), job="another")
        post("SignupServiceDown", job="signup-server-staging")
        assert not suppressed()
        post(*alerts.keys() - {"SignupServiceDown"})
        wait_until(lambda: suppressed() == PAIRS.keys())
        assert {alerts[name]["severity"] for name in PAIRS} == {"warning"}
        assert {alerts[name]["severity"] for name in PAIRS.values()} == {"critical"}
        post("SignupServiceDown")
        wait_until(lambda: suppressed() == others)
