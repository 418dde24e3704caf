"""The compose file: its schema, and its consistency with the files and services that it names.

`make compose-check` runs the stack: that its services find each other and their files, and are
reachable only from where they should be, is checked there.
"""

import os
import re
import shutil
import subprocess
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from drills.compose import PORTS
from signup.config import Config
from signup.database import GRACE
from testbed import ROOT

TEXT = (ROOT / "docker-compose.yml").read_text()
COMPOSE = yaml.safe_load(TEXT)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
NGINX = "".join(path.read_text() for path in sorted((ROOT / "nginx").glob("*.conf")))
GUNICORN = (ROOT / "gunicorn.conf.py").read_text()
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def graceful_timeout() -> float:
    """Return the graceful timeout of gunicorn.conf.py with the default settings, in seconds."""
    config = Config.from_env({})
    (spare,) = re.findall(r"^graceful_timeout = .+ \+ (\d+)$", GUNICORN, re.MULTILINE)
    return config.database_pool_timeout + config.database_statement_timeout + int(spare)


def test_compose_up_checks_the_files_before_it_starts_anything(tmp_path: Path) -> None:
    for name in ("Makefile", "docker-compose.yml"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("deploy", "grafana", "nginx", "prometheus"):
        shutil.copytree(ROOT / name, tmp_path / name)
    env = os.environ | {"DOCKER_HOST": f"unix://{tmp_path}/none"}
    tls, settings = tmp_path / "nginx/tls", tmp_path / ".env"

    def refused(cause: str, path: Path, mode: int) -> None:
        """Check the cause of a refusal while `path` has `mode`."""
        before = path.stat().st_mode
        path.chmod(mode)
        done = subprocess.run(["make", "compose-up"], cwd=tmp_path, env=env, capture_output=True)
        path.chmod(before)
        assert done.returncode and cause in done.stderr.decode()

    for hidden, mode in (("nginx", 0o700), ("prometheus/prometheus.yml", 0o600)):  # as by umask 077
        refused(f"can't read {hidden}: chmod go+rX {hidden}\n", tmp_path / hidden, mode)
    tls.mkdir(exist_ok=True)
    for key in ("fullchain.pem", "privkey.pem"):
        (tls / key).touch(0o644)
    refused("can't read nginx/tls/fullchain.pem: sudo chown 101:101", tls / "fullchain.pem", 0o600)
    refused("others may read nginx/tls/privkey.pem", tls / "privkey.pem", 0o644)
    refused("can't read nginx/tls: chmod go+rX nginx/tls", tls, 0o700)
    (tls / "fullchain.pem").unlink()
    refused("nginx/tls/fullchain.pem is no file", tls, 0o755)
    assert not settings.exists()
    shutil.rmtree(tls)
    refused("wrote", tmp_path, 0o755)  # and no engine
    written = settings.read_text()
    assert len(set(re.findall(r"^\w+_PASSWORD='(\w{48})'$", written, re.MULTILINE))) == 3
    assert settings.stat().st_mode & 0o777 == 0o600
    refused("", tmp_path, 0o755)
    assert settings.read_text() == written


def test_every_service_has_a_bounded_log_and_limits() -> None:
    for name, service in SERVICES.items():
        assert service["logging"]["options"].keys() == {"max-size", "max-file"}, name
        assert service["deploy"]["resources"]["limits"].keys() >= {"cpus", "memory"}, name


def test_mounts_that_the_stand_ins_do_not_use_match_the_configuration() -> None:
    def mounts(service: str) -> dict[str, str]:
        return {v.split(":")[1]: v.split(":")[0] for v in SERVICES[service]["volumes"]}

    provider = yaml.safe_load((ROOT / "grafana/provisioning/dashboards/signup.yml").read_text())
    path = provider["providers"][0]["options"]["path"]
    assert mounts("grafana")[path] == "./grafana/dashboards"
    assert mounts("grafana")["/etc/grafana"] == "./grafana"  # grafana.ini and provisioning
    sources = (ROOT / "grafana/provisioning/datasources/signup.yml").read_text()
    assert set(re.findall(r"//([a-z-]+):(\d+)", sources)) == {
        (name, str(PORTS[name])) for name in ("prometheus", "alertmanager")
    }
    # Since version 18, PostgreSQL's image keeps its data in a versioned folder below this one.
    assert int(re.split("[:.]", SERVICES["db"]["image"])[1]) >= 18
    assert mounts("db") == {"/var/lib/postgresql": "db"}
    assert SERVICES["role"]["image"] == SERVICES["db"]["image"]


def test_postgresql_allows_a_rolling_update_of_seven_replicas() -> None:
    (most,) = re.findall(r"max_connections=(\d+)", " ".join(SERVICES["db"]["command"]))
    config = Config.from_env({})
    assert 2 * 7 * config.database_max_connections + 10 < int(most)


def test_limits_and_timeouts_are_consistent() -> None:
    def seconds(name: str) -> int:
        (value,) = re.findall(rf"\b{name} (\d+)s;", NGINX)
        return int(value)

    config = Config.from_env({})
    assert f"client_max_body_size {config.max_body_bytes // 1024}k;" in NGINX
    longest = config.database_pool_timeout + config.database_statement_timeout + GRACE
    assert longest < seconds("proxy_read_timeout")
    (keepalive,) = re.findall(r"^keepalive = (\d+)", GUNICORN, re.MULTILINE)
    assert longest < graceful_timeout()
    upstream = NGINX[NGINX.index("upstream signup") :]
    idle, *_ = re.findall(r"keepalive_timeout (\d+)s;", upstream)
    assert int(idle) < int(keepalive) < graceful_timeout()
    stop = int(SERVICES["server"]["stop_grace_period"].removesuffix("s"))
    assert stop > graceful_timeout()
    stop = int(SERVICES["proxy"]["stop_grace_period"].removesuffix("s"))
    assert stop > seconds("proxy_read_timeout")
    (valid,) = re.findall(r"valid=(\d+)s", NGINX)
    (fail,) = re.findall(r"fail_timeout=(\d+)s", NGINX)
    assert int(valid) < int(fail)  # an address from DNS expires before nginx retries it


def test_every_setting_can_be_set_in_env() -> None:
    names = {field.name.upper() for field in fields(Config)} - {"DATABASE_URL", "PORT"}
    passed = SERVICES["server"]["environment"]
    assert names <= passed.keys() | {"PROMETHEUS_MULTIPROC_DIR"}
    for name in names & passed.keys():
        assert passed[name] is None or passed[name].startswith(f"${{{name}:-")
    example = (ROOT / ".env.example").read_text()
    assert set(re.findall(r"^(\w+)=''$", example, re.MULTILINE)) == COMPOSE["secrets"].keys()
    optional = set(re.findall(r"^#(\w+)=", example, re.MULTILINE))
    used = set(re.findall(r"\$\{(\w+)", TEXT)) - {"SIGNUP_VERSION"}
    assert optional == used | (names & passed.keys())


def test_images_are_pinned() -> None:
    for name, service in SERVICES.items():
        if "build" not in service:
            assert re.search(r":v?\d+\.\d+(\.\d+)?$", service["image"]), name
    (python,) = set(re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE))
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", python)
    assert f'base.name="{python}"' in DOCKERFILE


def test_image_installs_the_pinned_requirements_by_hash() -> None:
    def pins(name: str) -> set[str]:
        found = re.findall(r"^([\w.-]+==[^\s\\]+)", (ROOT / name).read_text(), re.MULTILINE)
        return {pin.replace(".", "-", pin.split("==")[0].count(".")) for pin in found}

    assert pins("deploy/requirements-hashed.txt") == pins("requirements.txt")
    assert "--require-hashes" in DOCKERFILE
