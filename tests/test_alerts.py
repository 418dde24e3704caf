"""Alerts from a real cause through Prometheus to Alertmanager, and its inhibition."""

import json
import re
import threading
import time
from pathlib import Path

import pytest
import requests
import yaml
from werkzeug import Request, Response
from werkzeug.serving import make_server

from drills.alerts import Deployment
from testbed import ROOT, wait_until
from testbed.monitoring import Alertmanager, Prometheus

from .test_rules import ALERTS

CONSEQUENCES = {  # of a critical alert: others, which it inhibits
    "SignupNotReady": "SignupInstanceDown SignupHighErrorRate SignupHighServerErrors"
    " SignupDatabaseErrors SignupVerySlowLatency SignupVerySlowDatabaseQueries SignupSlowLatency"
    " SignupDatabaseConnectionsHigh SignupBudgetBurnFast SignupNoSignups",
    "SignupUnreachable": "SignupProbesDegraded SignupProxyRejecting SignupTrafficDrop",
    "SignupHighServerErrors": "SignupHighErrorRate SignupDatabaseErrors SignupBudgetBurnFast"
    " SignupVerySlowLatency SignupVerySlowDatabaseQueries SignupDatabaseConnectionsHigh",
    "SignupHighErrorRate": "SignupDatabaseErrors SignupBudgetBurnFast",
    "SignupVerySlowDatabaseQueries": "SignupVerySlowLatency SignupSlowLatency"
    " SignupSlowDatabaseQueries SignupDatabaseConnectionsHigh SignupBudgetBurnFast",
    "SignupVerySlowLatency": "SignupSlowLatency SignupBudgetBurnFast",
    "SignupDatabaseConnectionsHigh": "SignupDatabaseConnectionsElevated",
    "SignupBudgetBurnFast": "SignupBudgetBurnSlow",
}


@pytest.mark.needs("prometheus", "prometheus-alertmanager", "prometheus-blackbox-exporter", "nginx")
def test_alerts_fire_with_their_cause_and_resolve_after_it() -> None:
    """A short `make alert-drill`."""
    with Deployment() as deployment:
        for cause, caused in {
            "database stopped": "SignupNotReady SignupHighErrorRate SignupHighServerErrors",
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
        firing = 'ALERTS{alertname="NotificationsFailing", alertstate="firing"}'
        wait_until(lambda: prometheus.query(firing), timeout=60)


@pytest.mark.needs("prometheus-alertmanager")
def test_each_outage_pages_and_no_consequence_does(tmp_path: Path) -> None:
    sent: list[str] = []

    @Request.application
    def webhook(request: Request) -> Response:
        sent.append(" ".join([request.json["receiver"], *request.json["groupLabels"].values()]))
        return Response()

    def post(name: str, **labels: str) -> None:
        place = {"cluster": "one", "job": "signup-server", "objective": "latency"}
        body = [{"labels": place | {"alertname": name} | ALERTS[name]["labels"] | labels}]
        requests.post(f"{alertmanager.url}/api/v2/alerts", json=body).raise_for_status()

    def suppressed(namespace: str) -> set[str]:
        found = alertmanager.get("/api/v2/alerts", filter=f'namespace="{namespace}"')
        return {a["labels"]["alertname"] for a in found if a["status"]["state"] == "suppressed"}

    server = make_server("127.0.0.1", 0, webhook, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    alertmanager = Alertmanager()
    config = yaml.safe_load(alertmanager.config.read_text())
    config["route"]["group_wait"] = "1s"
    for receiver in config["receivers"]:
        receiver["webhook_configs"] = [{"url": f"http://127.0.0.1:{server.server_port}"}]
    alertmanager.config = tmp_path / "alertmanager.yml"
    alertmanager.config.write_text(json.dumps(config))
    others = [name for name in ALERTS if re.match("Signup(?!ServiceDown|NotReady)", name)]
    with alertmanager:
        expected = []
        for line in (  # one after another, so that each starts a group of its own
            "page SignupServiceDown one signup-server-staging",
            "page SignupServiceDown one signup-server",
            "page SignupServiceDown two signup-server",
            "ticket SignupNoSignups three signup-server",
            "page SignupUnreachable three signup-server",
            "info SignupTrafficSpike three signup-server",
            "watchdog Watchdog three signup-server",
        ):
            _, name, cluster, job = line.split()
            post(name, cluster=cluster, job=job)
            expected.append(line)
            wait_until(lambda: sent == expected)
        causes = {each: names.split() for each, names in CONSEQUENCES.items()}
        for cause, consequences in (causes | {"SignupServiceDown": others}).items():
            for name in (cause, *consequences):
                is_page = {"severity": "critical"} if name == "SignupHighErrorRate" else {}
                post(name, namespace=cause, **is_page)
            wait_until(lambda: suppressed(cause) == {*consequences})
            expected.append(f"page {cause} one signup-server {cause}")
            wait_until(lambda: sent == expected)
        # Errors of clients alone stay beside the server's, and other jobs are not affected.
        post("SignupSlowLatency", namespace="SignupServiceDown", job="signup-server-staging")
        post("SignupHighErrorRate", namespace="SignupHighServerErrors")
        tickets = {
            "ticket SignupSlowLatency one signup-server-staging SignupServiceDown",
            "ticket SignupHighErrorRate one signup-server SignupHighServerErrors",
        }
        wait_until(lambda: tickets == {*sent[len(expected) :]})
    server.shutdown()


@pytest.mark.needs("prometheus")
def test_restart_of_prometheus_does_not_start_an_alert_anew() -> None:
    pending = 'ALERTS_FOR_STATE{alertname="SignupServiceDown"}'  # it has no target
    with Prometheus("1s", lambda rules: rules) as prometheus:
        wait_until(lambda: prometheus.query(f"time() - {pending} > 5"))
        prometheus.stop()
        stopped = time.time()
        prometheus.start()
        wait_until(lambda: prometheus.query(f"timestamp({pending}) > {stopped}"))
        assert prometheus.query(f"{pending} < {stopped}")
