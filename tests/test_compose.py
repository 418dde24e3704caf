"""The compose file: its schema, and that everything it mentions exists."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from signup.config import Config

from .service import ROOT

TEXT = (ROOT / "docker-compose.yml").read_text()
COMPOSE = yaml.safe_load(TEXT)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
PORTS = {"prometheus": 9090, "alertmanager": 9093, "grafana": 3000, "cadvisor": 8080, "db": 5432}


def test_it_follows_the_compose_specification() -> None:
    check = Path(sys.executable).with_name("check-jsonschema")
    schema = "vendor.compose-spec"
    file = ROOT / "docker-compose.yml"
    done = subprocess.run([check, "--builtin-schema", schema, file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_every_mount_exists() -> None:
    for service in SERVICES.values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("./"):
                assert (ROOT / source).exists(), source
            else:
                assert source.startswith("/") or source in COMPOSE["volumes"]


def test_paths_inside_are_those_of_the_configuration() -> None:
    def mounts(service: str) -> dict[str, str]:
        return {v.split(":")[1]: v.split(":")[0] for v in SERVICES[service]["volumes"]}

    assert mounts("prometheus")["/etc/prometheus"] == "./prometheus"
    assert "--config.file=/etc/prometheus/prometheus.yml" in SERVICES["prometheus"]["command"]
    provider = yaml.safe_load((ROOT / "grafana/provisioning/dashboards/signup.yml").read_text())
    path = provider["providers"][0]["options"]["path"]
    assert mounts("grafana")[path] == "./grafana/dashboards"
    for kind in ("datasources", "dashboards"):
        inside = f"/etc/grafana/provisioning/{kind}"
        assert mounts("grafana")[inside] == f"./grafana/provisioning/{kind}"


def test_addresses_of_other_services_exist() -> None:
    files = [
        *ROOT.glob("prometheus/*.yml"),
        *ROOT.glob("grafana/provisioning/*/*.yml"),
        ROOT / "docker-compose.yml",
    ]
    found = {
        match
        for file in files
        for match in re.findall(r"(?:@|//|\")([a-z]+):(\d+)", file.read_text())
    } - {("localhost", "9090")}
    assert found == {(name, str(port)) for name, port in PORTS.items() if name != "grafana"}
    assert set(SERVICES) == {*PORTS, "server"}
    (name,) = yaml.safe_load((ROOT / "prometheus/prometheus.yml").read_text())["scrape_configs"][1][
        "dns_sd_configs"
    ][0]["names"]
    assert name in SERVICES


def test_only_what_is_to_be_seen_is_published() -> None:
    published = {name: s["ports"] for name, s in SERVICES.items() if "ports" in s}
    assert published == {
        "server": ["3000:3000"],
        "prometheus": ["127.0.0.1:9090:9090"],
        "grafana": ["127.0.0.1:3001:3000"],
    }


def test_settings_and_secrets_have_names_that_exist() -> None:
    asked = set(re.findall(r"\$\{(\w+):\?", TEXT))
    assert set(re.findall(r"\$\{(\w+)", TEXT)) == asked  # none has a default
    example = (ROOT / ".env.example").read_text()
    assert set(re.findall(r"^(\w+)=$", example, re.MULTILINE)) == asked
    settings = SERVICES["server"]["environment"]
    assert set(settings) <= set(
        re.findall(r"[A-Z_]{4,}", Path(Config.from_env.__code__.co_filename).read_text())
    )
    assert Config.from_env(settings).database_url == settings["DATABASE_URL"]


def test_images_are_pinned() -> None:
    for name, service in SERVICES.items():
        if "build" not in service:
            assert re.search(r":v?\d+\.\d+(\.\d+)?$", service["image"]), name
    assert (
        re.findall(r"^FROM (\S+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
        == ["python:3.13-slim-bookworm"] * 2
    )
