"""The Kubernetes manifests: their schemas, and their consistency with the project."""

import re
import shlex
import subprocess
from typing import Any

import kubernetes_validate
import pytest
import yaml

from drills.compose import runbook_commands
from signup.config import Config
from signup.database import READY_TIMEOUT
from testbed import ROOT

from .test_compose import graceful_timeout

FOLDER = ROOT / "deploy/kubernetes"
KUSTOMIZATION = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
OBJECTS: dict[str, dict[str, Any]] = {
    manifest["kind"]: manifest
    for manifest in (yaml.safe_load((FOLDER / n).read_text()) for n in KUSTOMIZATION["resources"])
}
GATEWAY = FOLDER / "gateway/nginx.yaml"  # needs other definitions, so it is applied by itself
CUSTOM = {"ServiceMonitor", "PrometheusRule", "Probe"}  # defined by the Prometheus Operator
POD = OBJECTS["Deployment"]["spec"]["template"]
(CONTAINER,) = POD["spec"]["containers"]
SCRAPES = yaml.safe_load((ROOT / "prometheus/prometheus.yml").read_text())
JOBS = {job["job_name"]: job for job in SCRAPES["scrape_configs"]}


def test_every_file_is_a_resource() -> None:
    files = {path.name for path in FOLDER.glob("*.yaml")} - {"kustomization.yaml"}
    assert files == set(KUSTOMIZATION["resources"])
    assert {path for path in FOLDER.iterdir() if path.suffix != ".yaml"} == {GATEWAY.parent}


@pytest.mark.parametrize("version", ["1.30", "1.37"])  # 1.30: the oldest with preStop.sleep
def test_manifests_follow_the_kubernetes_schemas(version: str) -> None:
    checked = [kind for kind in OBJECTS if kind not in CUSTOM]
    assert len(checked) == 5
    for kind in checked:
        kubernetes_validate.validate(OBJECTS[kind], version, strict=True)


def test_selectors_match_the_pods() -> None:
    labels = POD["metadata"]["labels"]
    assert OBJECTS["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert OBJECTS["Service"]["spec"]["selector"] == labels
    assert OBJECTS["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    assert OBJECTS["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == labels
    (spread,) = POD["spec"]["topologySpreadConstraints"]
    assert spread["labelSelector"]["matchLabels"] == labels
    assert spread["matchLabelKeys"] == ["pod-template-hash"]
    wanted = OBJECTS["ServiceMonitor"]["spec"]["selector"]["matchLabels"]
    assert OBJECTS["Service"]["metadata"]["labels"] == wanted
    target = OBJECTS["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    assert target == {
        "apiVersion": OBJECTS["Deployment"]["apiVersion"],
        "kind": "Deployment",
        "name": OBJECTS["Deployment"]["metadata"]["name"],
    }
    assert "replicas" not in OBJECTS["Deployment"]["spec"]
    assert OBJECTS["Deployment"]["spec"]["strategy"]["type"] == "RollingUpdate"
    assert OBJECTS["PodDisruptionBudget"]["spec"]["unhealthyPodEvictionPolicy"] == "AlwaysAllow"


def test_ports_and_paths_match_the_service() -> None:
    assert CONTAINER["ports"] == [{"name": "http", "containerPort": Config.from_env({}).port}]
    (port,) = OBJECTS["Service"]["spec"]["ports"]
    endpoints = OBJECTS["ServiceMonitor"]["spec"]["endpoints"]
    (ingress,) = OBJECTS["NetworkPolicy"]["spec"]["ingress"]
    probes = ("startupProbe", "livenessProbe", "readinessProbe")
    paths = [CONTAINER[probe]["httpGet"]["path"] for probe in probes]
    assert paths == ["/healthz", "/healthz", "/readyz"]
    for name in (
        *(CONTAINER[probe]["httpGet"]["port"] for probe in probes),
        *(port["targetPort"], port["name"], ingress["ports"][0]["port"]),
        *(endpoint["port"] for endpoint in endpoints),
    ):
        assert name == "http"


def test_service_monitor_matches_prometheus_yml() -> None:
    scrape, ready = OBJECTS["ServiceMonitor"]["spec"]["endpoints"]
    # Without a jobLabel, the label `job` is the name of the Service.
    assert "jobLabel" not in OBJECTS["ServiceMonitor"]["spec"]
    assert OBJECTS["Service"]["metadata"]["name"] == "signup-server"
    assert scrape["path"] == JOBS["signup-server"].get("metrics_path", "/metrics")
    assert scrape["interval"] == ready["interval"] == SCRAPES["global"]["scrape_interval"]
    job = JOBS["signup-ready"]
    assert (ready["path"], ready["params"]) == (job["metrics_path"], job["params"])
    labels = [each["targetLabel"] for each in ready["relabelings"]]
    assert labels == [*(each["target_label"] for each in job["relabel_configs"]), "job"]
    assert ready["relabelings"][-1]["replacement"] == job["job_name"]


def test_probe_matches_prometheus_yml() -> None:
    probe = OBJECTS["Probe"]["spec"]
    job = JOBS[probe["jobName"]]
    paths = {
        config["labels"]["__param_module"]: config["targets"][0].rpartition("/")[2]
        for config in job["static_configs"]
    }
    modules = yaml.safe_load((ROOT / "prometheus/blackbox.yml").read_text())["modules"]
    assert paths.keys() | {"ready"} == modules.keys()
    (address,) = probe["targets"]["staticConfig"]["static"]
    assert address.rpartition("/")[2] == paths[probe["module"]]
    assert probe["interval"] == SCRAPES["global"]["scrape_interval"]


def test_prometheus_rule_equals_the_rule_files() -> None:
    names = ("alerts", "recording", "slo")  # kube-prometheus has rules for the monitoring
    files = [ROOT / f"prometheus/rules/{name}.yml" for name in names]
    groups = [g for file in files for g in yaml.safe_load(file.read_text())["groups"]]
    assert OBJECTS["PrometheusRule"]["spec"] == {"groups": groups}
    assert (FOLDER / "prometheus-rule.yaml").read_text().count("{{ $value") > 10


def test_runbook_commands_name_what_the_manifests_create() -> None:
    lines = [line for line in runbook_commands() if line.startswith("kubectl ")]
    assert len(lines) > 5
    for line in lines:
        assert subprocess.run(["sh", "-n", "-c", line]).returncode == 0
        _, option, namespace, *_ = shlex.split(line)
        assert option == "--namespace" and namespace in {KUSTOMIZATION["namespace"], "monitoring"}
        if namespace != "monitoring":  # what is there is kube-prometheus'
            names = re.findall(r"(?:deployment/|kubernetes.io/name=)(\S+)", line)
            assert set(names) <= {OBJECTS["Deployment"]["metadata"]["name"]}


def test_container_matches_the_dockerfile_and_settings() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    security = POD["spec"]["securityContext"]
    assert f"USER {security['runAsUser']}:{security['runAsGroup']}\n" in dockerfile
    assert {"name": CONTAINER["image"]} in KUSTOMIZATION["images"]
    settings = {variable["name"]: variable for variable in CONTAINER["env"]}
    assert set(settings) == {"DATABASE_URL", "WEB_CONCURRENCY"}
    workers = settings["WEB_CONCURRENCY"]["value"]
    assert Config.from_env({"WEB_CONCURRENCY": workers}).web_concurrency == 2


def test_timeouts_are_consistent() -> None:
    assert CONTAINER["readinessProbe"]["timeoutSeconds"] > READY_TIMEOUT
    stop = CONTAINER["lifecycle"]["preStop"]["sleep"]["seconds"] + graceful_timeout()
    assert POD["spec"]["terminationGracePeriodSeconds"] > stop
    probe = CONTAINER["startupProbe"]  # after a run of 10 minutes, the back-off starts anew
    assert probe["periodSeconds"] * probe["failureThreshold"] > 600


def test_gateway_has_the_routes_and_limits_of_the_proxy() -> None:
    gateway, *others = yaml.safe_load_all(GATEWAY.read_text())
    rules = [each["spec"]["rules"][0] for each in others if each["kind"] == "HTTPRoute"]
    routes = [rule for rule in rules if "filters" not in rule]  # not the redirect to HTTPS
    paths = [match["path"] for route in routes for match in route["matches"]]
    assert paths == [{"type": "Exact", "value": path} for path in ("/signup", "/", "/healthz")]
    (service,) = OBJECTS["Service"]["spec"]["ports"]
    backend = {"name": OBJECTS["Service"]["metadata"]["name"], "port": service["port"]}
    assert [route["backendRefs"] for route in routes] == [[backend]] * 2
    limits = {each["kind"]: each["spec"] for each in others}
    (limit,) = limits["RateLimitPolicy"]["rateLimit"]["local"]["rules"]
    assert (limit["rate"], limit["burst"], limit["noDelay"]) == ("10r/s", 20, True)
    assert limits["ClientSettingsPolicy"]["body"]["maxSize"] == "16k"
    assert limits["UpstreamSettingsPolicy"]["keepAlive"]["timeout"] == "5s"
    label = {"gateway.networking.k8s.io/gateway-name": gateway["metadata"]["name"]}
    (ingress,) = OBJECTS["NetworkPolicy"]["spec"]["ingress"]
    assert {"podSelector": {"matchLabels": label}} in ingress["from"]


def test_postgresql_allows_the_maximum_number_of_replicas() -> None:
    most = OBJECTS["HorizontalPodAutoscaler"]["spec"]["maxReplicas"]
    surge = OBJECTS["Deployment"]["spec"]["strategy"]["rollingUpdate"]["maxSurge"]
    connections = (most + surge) * Config.from_env({}).database_max_connections
    text = (FOLDER / "horizontal-pod-autoscaler.yaml").read_text()
    assert f"{connections} connections" in text
    (configured,) = re.findall(r"max_connections=(\d+)", (ROOT / "docker-compose.yml").read_text())
    assert connections + 10 < int(configured)
