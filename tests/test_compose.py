"""The compose file: its schema, and that everything it mentions exists."""

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from signup.config import Config
from signup.database import GRACE
from testbed import ROOT

TEXT = (ROOT / "docker-compose.yml").read_text()
COMPOSE = yaml.safe_load(TEXT)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
NGINX = (ROOT / "nginx/nginx.conf").read_text() + (ROOT / "nginx/replicas.conf").read_text()
GUNICORN = (ROOT / "gunicorn.conf.py").read_text()
PORTS = {
    "server": 3000,
    "prometheus": 9090,
    "alertmanager": 9093,
    "grafana": 3000,
    "cadvisor": 8080,
    "blackbox-exporter": 9115,
    "proxy": 8080,
    "db": 5432,
}


def graceful_timeout() -> float:
    """Of gunicorn.conf.py, with the defaults: seconds."""
    config = Config.from_env({})
    (spare,) = re.findall(r"^graceful_timeout = .+ \+ (\d+)$", GUNICORN, re.MULTILINE)
    return config.database_pool_timeout + config.database_statement_timeout + int(spare)


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
        *ROOT.glob("nginx/*.conf"),
        ROOT / "docker-compose.yml",
    ]
    found = {
        match
        for file in files
        for match in re.findall(r"(?:@|//|\"|server )([a-z-]+):(\d+)", file.read_text())
    } - {("localhost", "9090")}
    assert found == {(name, str(port)) for name, port in PORTS.items() if name != "grafana"}
    assert SERVICES.keys() == PORTS.keys()
    jobs = yaml.safe_load((ROOT / "prometheus/prometheus.yml").read_text())["scrape_configs"]
    (job,) = (job for job in jobs if "dns_sd_configs" in job)
    assert job["dns_sd_configs"][0]["names"] == ["server"]


def test_only_what_is_to_be_seen_is_published() -> None:
    published = {name: s["ports"] for name, s in SERVICES.items() if "ports" in s}
    (port,) = re.findall(r"listen (\d+);", NGINX)
    assert published == {
        "proxy": [f"3000:{port}"],
        "prometheus": ["127.0.0.1:9090:9090"],
        "grafana": ["127.0.0.1:3001:3000"],
    }
    assert f"http://127.0.0.1:{port}/healthz" in SERVICES["proxy"]["healthcheck"]["test"]


def test_each_service_sees_only_what_it_needs() -> None:
    members: dict[str, set[str]] = {name: set() for name in COMPOSE["networks"]}
    for name, service in SERVICES.items():
        for network in service["networks"]:
            members[network].add(name)
    assert members == {
        "front": {"proxy", "server"},
        "probe": {"proxy", "blackbox-exporter"},
        "data": {"server", "db"},
        "monitoring": {
            *("server", "prometheus", "alertmanager", "blackbox-exporter", "grafana", "cadvisor")
        },
    }
    # Whoever is in this network, the service believes what is forwarded.
    (config,) = COMPOSE["networks"]["front"]["ipam"]["config"]
    assert SERVICES["server"]["environment"]["FORWARDED_ALLOW_IPS"] == config["subnet"]


def test_four_replicas_fit() -> None:
    (most,) = re.findall(r"max_connections=(\d+)", " ".join(SERVICES["db"]["command"]))
    config = Config.from_env({})
    assert 4 * config.database_max_connections + 10 < int(most)
    for service in SERVICES.values():
        assert "container_name" not in service
        assert service["deploy"]["resources"]["limits"].keys() >= {"cpus", "memory"}
    assert "ports" not in SERVICES["server"]


def test_limits_and_time_outs_fit_each_other() -> None:
    def seconds(name: str) -> int:
        (value,) = re.findall(rf"\b{name} (\d+)s;", NGINX)
        return int(value)

    config = Config.from_env({})
    assert f"client_max_body_size {config.max_body_bytes // 1024}k;" in NGINX
    assert f"client_body_buffer_size {config.max_body_bytes // 1024}k;" in NGINX
    longest = config.database_pool_timeout + config.database_statement_timeout + GRACE
    assert longest < seconds("proxy_read_timeout")
    (keepalive,) = re.findall(r"^keepalive = (\d+)", GUNICORN, re.MULTILINE)
    assert longest < graceful_timeout()
    upstream = NGINX[NGINX.index("upstream signup") :]
    (idle,) = re.findall(r"keepalive_timeout (\d+)s;", upstream)
    assert int(idle) < int(keepalive) < graceful_timeout()
    stop = int(SERVICES["server"]["stop_grace_period"].removesuffix("s"))
    assert stop > graceful_timeout()


def test_settings_and_secrets_have_names_that_exist() -> None:
    asked = set(re.findall(r"\$\{(\w+):\?", TEXT))
    assert set(re.findall(r"\$\{(\w+)", TEXT)) == asked  # none has a default
    example = (ROOT / ".env.example").read_text()
    assert set(re.findall(r"^(\w+)=$", example, re.MULTILINE)) == asked
    environment = SERVICES["server"]["environment"]
    settings = {k: re.sub(r"\$\{.*?\}", "0123", str(v)) for k, v in environment.items()}
    names = {field.name.upper() for field in fields(Config)}
    assert set(settings) <= {*names, "FORWARDED_ALLOW_IPS"}  # that one is gunicorn's own
    assert Config.from_env(settings).database_url == settings["DATABASE_URL"]


def test_images_are_pinned() -> None:
    for name, service in SERVICES.items():
        if "build" not in service:
            assert re.search(r":v?\d+\.\d+(\.\d+)?$", service["image"]), name
    assert (
        re.findall(r"^FROM (\S+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
        == ["python:3.13.5-slim-bookworm"] * 2
    )
