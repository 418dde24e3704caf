"""Prometheus, Alertmanager and the blackbox exporter, with their production configuration."""

import json
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import requests
import yaml

from . import ROOT
from .programs import Program

STAGING = "signup-server-staging"


class MonitoringApi:
    """The HTTP API of Prometheus, or of another server of its project, at `url`."""

    url: str

    def get(self, path: str, **parameters: Any) -> Any:
        """Return the JSON that the HTTP API responds with."""
        response = requests.get(self.url + path, params=parameters, timeout=30)
        assert response.ok, response.text
        return response.json()

    def query(self, query: str, time: float | None = None) -> dict[str, float]:
        """Return the values of an instant query by their label values, joined by commas.

        `time` is the evaluation time in seconds since 1970. Raises AssertionError if Prometheus
        rejects the query.
        """
        parameters = {"query": query} | ({"time": time} if time else {})
        result = self.get("/api/v1/query", **parameters)["data"]["result"]
        return {_name(sample["metric"]): float(sample["value"][1]) for sample in result}


class MonitoringProgram(Program, MonitoringApi):
    """A server of the Prometheus project."""

    ready = "/-/ready"

    def address(self) -> str | None:
        found = re.search(r'msg="Listening on".* address=(\S+)', self.log())
        url = found and f"http://{found[1]}"
        return url if url and requests.get(url + self.ready, timeout=10).ok else None


class Alertmanager(MonitoringProgram):
    """Alertmanager with prometheus/alertmanager.yml."""

    config = ROOT / "prometheus/alertmanager.yml"

    def command(self) -> list[str]:
        return [
            "prometheus-alertmanager",
            f"--config.file={self.config}",
            f"--storage.path={self.folder / 'data'}",
            "--web.listen-address=127.0.0.1:0",
            "--cluster.listen-address=",
        ]

    def alerts(self) -> dict[str, str]:
        """Return the state of each alert: active, or suppressed by another alert."""
        return {
            alert["labels"]["alertname"]: str(alert["status"]["state"])
            for alert in self.get("/api/v2/alerts")
        }


class BlackboxExporter(MonitoringProgram):
    """The blackbox exporter with prometheus/blackbox.yml."""

    ready = "/-/healthy"

    def command(self) -> list[str]:
        return [
            "prometheus-blackbox-exporter",
            f"--config.file={ROOT / 'prometheus/blackbox.yml'}",
            "--web.listen-address=127.0.0.1:0",
        ]


class Prometheus(MonitoringProgram):
    """Prometheus with prometheus/prometheus.yml, except for its targets and intervals.

    It scrapes and evaluates every `interval`, a Prometheus duration. There is no DNS:
    `set_targets` sets the targets of a job, and `set_probe_target` the URL that `prober` probes.
    STAGING is an additional job. `change` maps the text of a rule file to the text in use, and
    `alertmanager` receives the alerts.
    """

    def __init__(
        self,
        interval: str,
        change: Callable[[str], str],
        alertmanager: Alertmanager | None = None,
        prober: BlackboxExporter | None = None,
    ) -> None:
        self._interval = interval
        self._change = change
        self._alertmanager = alertmanager
        self._prober = prober

    def command(self) -> list[str]:
        stack = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
        rules = [each for each in stack["prometheus"]["command"] if each.startswith("--rules.")]
        return [
            "prometheus",
            *rules,
            f"--config.file={self._write_config()}",
            f"--storage.tsdb.path={self.folder / 'data'}",
            "--web.listen-address=127.0.0.1:0",
            "--rules.alert.resend-delay=1s",  # an alert sent before discovery is lost
        ]

    def _write_config(self) -> Path:
        config = yaml.safe_load((ROOT / "prometheus/prometheus.yml").read_text())
        for setting in ("scrape_interval", "scrape_timeout", "evaluation_interval"):
            config["global"][setting] = self._interval
        for file in (ROOT / "prometheus/rules").iterdir():
            (self.folder / f"rules-{file.name}").write_text(self._change(file.read_text()))
        config["rule_files"] = ["rules-*.yml"]
        if self._alertmanager:
            target = self._alertmanager.url.removeprefix("http://")
            config["alerting"]["alertmanagers"] = [{"static_configs": [{"targets": [target]}]}]
        else:
            del config["alerting"]
        config["scrape_configs"].append({"job_name": STAGING})
        for job in config["scrape_configs"]:
            for kind in ("dns_sd_configs", "static_configs"):
                job.pop(kind, None)
            job["file_sd_configs"] = [{"files": [f"{job['job_name']}.json"]}]
        path = self.folder / "prometheus.yml"
        text = yaml.safe_dump(config)
        if self._prober:
            assert text.count("blackbox-web:9115") == 2
            text = text.replace("blackbox-web:9115", self._prober.url.removeprefix("http://"))
        path.write_text(text)
        return path

    def set_targets(self, job: str, *urls: str) -> None:
        """Replace the targets of `job`."""
        self._write_targets(job, [{"targets": [url.removeprefix("http://") for url in urls]}])

    def set_probe_target(self, url: str) -> None:
        """Probe `url` from now on, as prometheus.yml probes the proxy."""
        config = (ROOT / "prometheus/prometheus.yml").read_text().replace("http://proxy:8080", url)
        jobs = {job["job_name"]: job for job in yaml.safe_load(config)["scrape_configs"]}
        self._write_targets("signup-probe", jobs["signup-probe"]["static_configs"])

    def _write_targets(self, job: str, groups: list[dict[str, Any]]) -> None:
        new = self.folder / "new"
        new.write_text(json.dumps(groups))
        new.rename(self.folder / f"{job}.json")

    def reload(self) -> None:
        """Reload the configuration."""
        self.send_signal(signal.SIGHUP)

    def backfill(self, samples: str) -> None:
        """Import past samples in OpenMetrics format; Prometheus restarts."""
        self.stop()
        file = self.folder / "samples"
        file.write_text(samples)
        subprocess.run(
            ["promtool", "tsdb", "create-blocks-from", "openmetrics", file, self.folder / "data"],
            check=True,
            capture_output=True,
        )
        self.start()


def _name(labels: dict[str, str]) -> str:
    return ",".join(value for label, value in sorted(labels.items()) if label != "__name__")
