"""`make compose-check`: starts, scales and breaks docker-compose.yml on a Docker engine.

Without an engine (DOCKER_HOST or the default), it starts one, with stand-ins for images that can't
be pulled (testbed/engine.py). It runs a copy of the files under a separate Compose project; ports
80, 443, 3000, 3001 and 9090 must be free. It prints a row for each step, and stops at the first
wrong result.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import requests
import yaml

from testbed import ROOT, engine, wait_until
from testbed.load import Signups
from testbed.monitoring import MonitoringApi
from testbed.nginx import certify
from testbed.service import USER, Client, user

# Characters with a special meaning in .env, a URL, a shell or SQL.
PASSWORD = "p@:/#%$'\"\\{} äß"
FILES = (".dockerignore", ".env.example", "Dockerfile", "Makefile", "app.py", "docker-compose.yml")
FOLDERS = ("deploy", "grafana", "nginx", "prometheus", "signup")
NAME = USER["last_name"]
CLIENTS = 64
BURST = 15  # seconds
PORTS = {
    "alertmanager": 9093,
    "blackbox-exporter": 9115,
    "cadvisor": 8080,
    "db": 5432,
    "grafana": 3000,
    "nginx-exporter": 9113,
    "prometheus": 9090,
    "proxy": 8080,
    "server": 3000,
}
BROKEN = {  # builds: a file, a piece of it, and what replaces the piece
    "can't start": ("app.py", "app = ", "import missing\napp = "),
    "answers every signup with a 500": ("signup/database.py", "values = [", "values = [1 / 0] + ["),
}


class Stack(Client):
    """The stack of docker-compose.yml under a separate project name."""

    url = "http://127.0.0.1:3000"
    prometheus = MonitoringApi()
    prometheus.url = "http://127.0.0.1:9090"

    def __init__(self, folder: Path, own_engine: bool) -> None:
        super().__init__()
        self.folder = folder
        for name in (*FILES, "gunicorn.conf.py"):
            shutil.copy(ROOT / name, folder)
        for name in FOLDERS:
            shutil.copytree(ROOT / name, folder / name)
        if own_engine:  # it can't give cAdvisor its privileges, devices and volumes
            file = yaml.safe_load((folder / "docker-compose.yml").read_text())
            for key in ("privileged", "devices", "volumes"):
                del file["services"]["cadvisor"][key]
            (folder / "docker-compose.yml").write_text(yaml.safe_dump(file))
        os.chdir(folder)
        os.environ["COMPOSE_PROJECT_NAME"] = "signup-check"

    def edit(self, name: str, old: str, new: str) -> None:
        """Replace a piece of a file in the copy."""
        text = (self.folder / name).read_text()
        assert old in text, name
        (self.folder / name).write_text(text.replace(old, new))

    def set_passwords(self, password: str) -> None:
        """Write the passwords to .env, quoted as .env.example says."""
        quoted = password.replace("'", "\\'")
        lines = (self.folder / ".env").read_text().splitlines()
        lines = [re.sub("PASSWORD=.*", lambda _: f"PASSWORD='{quoted}'", line) for line in lines]
        (self.folder / ".env").write_text("\n".join(lines) + "\n")

    def version(self) -> str:
        """Return the version of the image in .env."""
        (found,) = re.findall("^SIGNUP_VERSION=(.+)", (self.folder / ".env").read_text(), re.M)
        return str(found)

    def containers(self, service: str = "", *options: str) -> list[str]:
        """Return the ids of the containers, oldest first; by default of running ones."""
        return compose("ps", "--quiet", *options, *service.split()).split()[::-1]

    def inspect(self, *options: str) -> dict[str, Any]:
        """Return the output of `docker inspect` by container name, without the project prefix."""
        found = json.loads(run("docker", "inspect", *self.containers("", "--all", *options)))
        return {each["Name"].removeprefix("/signup-check-"): each for each in found}

    def addresses(self) -> list[str]:
        """Return the addresses of the running replicas on the network `front`."""
        return [
            each["NetworkSettings"]["Networks"]["signup-check_front"]["IPAddress"]
            for name, each in self.inspect().items()
            if name.startswith("server-") and each["State"]["Running"]
        ]

    def check_health(self) -> int:
        """Check that `role` exited with 0 and the others are healthy; return their number."""
        states = {name: each["State"] for name, each in self.inspect().items()}
        role = states.pop("role-1")
        assert (role["Status"], role["ExitCode"]) == ("exited", 0), role
        assert states.pop("nginx-exporter-1")["Running"]  # its image can't check itself
        assert all(s["Health"]["Status"] == "healthy" for s in states.values()), states
        return len(states) + 2

    def is_serving(self) -> bool:
        try:
            return self.get("/").ok
        except requests.ConnectionError:
            return False

    def alerts(self) -> set[str]:
        """Return the names of the alerts in Alertmanager."""
        ask = "wget -q -O - http://127.0.0.1:9093/api/v2/alerts"
        answer = compose("exec", "-T", "alertmanager", *ask.split())
        return {alert["labels"]["alertname"] for alert in json.loads(answer)}

    def query(self, sql: str) -> str:
        psql = ["psql", "--username=postgres", "--dbname=signup", "--tuples-only"]
        return compose("exec", "-T", "db", *psql, f"--command={sql}")

    def users(self) -> int:
        return int(self.query("SELECT count(*) FROM users"))

    def counted_signups(self) -> float:
        """Return the number of signups that all replicas have counted."""
        total = 0.0
        for address in self.addresses():
            replica = Client()
            replica.url = f"http://{address}:3000"
            total += replica.quiet_metrics().get_value("signup_requests_total", status_code="201")
        return total


class Traffic(Signups):
    """Five signups per second, each over a new connection."""

    def __init__(self, stack: Client, clients: int = 1, pause: float = 0.2) -> None:
        super().__init__(stack, clients)
        self._pause = pause

    def step(self, session: requests.Session, number: int, turn: int) -> None:
        self.sign_up(f"{time.monotonic_ns()}-{number}@example.com")
        time.sleep(self._pause)

    def count(self, *statuses: int) -> int:
        """Return the number of signups that got one of these statuses."""
        return sum(answer.status in statuses for answer in self.answers)

    def failed(self) -> Counter[str]:
        """Return the number of signups without a 201, by status or error."""
        names = [str(answer.status).partition("(")[0] for answer in self.answers]
        return Counter(name for name in names if name != "201")

    def __str__(self) -> str:
        failed = [f", {n} x {status}" for status, n in self.failed().items()]
        return f"{self.count(201)} of {len(self.answers)} got a 201{''.join(failed)}"


def run(*command: str) -> str:
    """Return the standard output of `command`; raise AssertionError with all output."""
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done.stdout


def compose(*command: str) -> str:
    return run("docker", "compose", *command)


def built() -> set[str]:
    names = "--format={{.Repository}}:{{.Tag}}"
    return set(run("docker", "images", names, "signup-server").split())


@contextlib.contextmanager
def row(what: str) -> Iterator[list[Any]]:
    """Print a row of the table after the block, which appends its results to the list."""
    seen: list[Any] = []
    begin = time.monotonic()
    yield seen
    print(
        f"| {what} | {time.monotonic() - begin:.1f} s | {'; '.join(map(str, seen))} |", flush=True
    )


@contextlib.contextmanager
def under_traffic(stack: Stack, what: str, at_most: int | None = 0) -> Iterator[list[Any]]:
    """Run `row` under five signups per second, of which at most `at_most` may fail."""
    with row(what) as seen:
        with Traffic(stack) as clients:
            wait_until(lambda: len(clients.answers) >= 5)
            yield seen
            enough = len(clients.answers) + 10
            wait_until(lambda: len(clients.answers) >= enough)
        seen.append(clients)
    assert at_most is None or clients.failed().total() <= at_most, clients


def start(stack: Stack, own_engine: bool) -> None:
    with row("`make compose-build`") as seen:
        run("make", "compose-build")
        check = "from importlib.util import find_spec; print(find_spec('pip'))"
        image = ["docker", "run", "--rm", "--network=none", f"signup-server:{stack.version()}"]
        assert run(*image, "python", "-c", check) == "None\n"
        seen.append("no pip in the image")
    with row("`make compose-up`") as seen:
        if own_engine:  # a proxy that no request inside may take
            proxies = {"proxies": {"default": {"httpProxy": "http://192.0.2.1:9"}}}
            (stack.folder / "config.json").write_text(json.dumps(proxies))
            os.environ["DOCKER_CONFIG"] = str(stack.folder)
        run("make", "compose-up")
        seen.append(f"{stack.check_health()} containers, all healthy")
        settings = stack.folder / ".env"
        assert settings.stat().st_mode & 0o777 == 0o600
        passwords = re.findall("PASSWORD='(.+)'", settings.read_text())
        shown = json.dumps(stack.inspect())
        assert len(set(passwords)) == 3 and not [each for each in passwords if each in shown]
        seen.append("three random passwords, `docker inspect` shows none")
        ask = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 2)"
        for name in ("prometheus", "alertmanager", "blackbox-exporter", "cadvisor", "grafana"):
            inside = ["docker", "compose", "exec", "-T", "server", "python", "-c", ask]
            assert subprocess.run([*inside, name, str(PORTS[name])], capture_output=True).returncode
        seen.append("a replica reaches nothing of the monitoring")


def front_door(stack: Stack) -> None:
    with row("requests through the proxy") as seen:
        statuses = [stack.signup(json=USER).status_code for _ in range(2)]
        assert statuses == [201, 409], statuses
        hidden = ("/metrics", "/readyz", "/openapi.json")
        assert [stack.get(path).status_code for path in hidden] == [404] * 3
        seen.append(f"201, then 409; {', '.join(hidden)}: 404")


def outside(stack: Stack) -> None:
    """Connect from a network namespace one hop away, with routes to every engine network."""
    targets = {str(port): ("10.99.0.1", port) for port in (3000, 3001, 9090)}
    for name, each in stack.inspect("--status=running").items():
        for network in each["NetworkSettings"]["Networks"].values():
            address = network["IPAddress"]
            targets[f"{name} {address}"] = (address, PORTS[name.rpartition("-")[0]])
    program = """
import json, socket, sys
for name, address in json.loads(sys.argv[1]).items():
    try:
        socket.create_connection(address, timeout=1)
        print(name)
    except OSError:
        pass
"""
    with row("connections from another machine") as seen:
        for command in (
            "ip netns add outside",
            "ip link add near type veth peer name far netns outside",
            "ip address add 10.99.0.1/24 dev near",
            "ip link set near up",
            "ip -n outside address add 10.99.0.2/24 dev far",
            "ip -n outside link set far up",
            "ip -n outside route add default via 10.99.0.1",
        ):
            run(*command.split())
        try:
            inside = ["ip", "netns", "exec", "outside", sys.executable, "-c", program]
            reached = run(*inside, json.dumps(targets)).splitlines()
        finally:
            run("ip", "netns", "delete", "outside")
        assert reached == ["3000"], reached
        seen.append(f"port 3000 reachable, {len(targets) - 1} other addresses not")


def watched(stack: Stack) -> None:
    config = yaml.safe_load((ROOT / "prometheus/prometheus.yml").read_text())
    jobs = {job["job_name"] for job in config["scrape_configs"]}
    with row("Prometheus targets and rules") as seen:

        def up() -> list[Any] | None:
            targets = stack.prometheus.get("/api/v1/targets")["data"]["activeTargets"]
            all_up = all(target["health"] == "up" for target in targets)
            return targets if all_up and {t["labels"]["job"] for t in targets} == jobs else None

        targets = wait_until(up, timeout=60)

        def rules() -> list[Any] | None:
            groups = stack.prometheus.get("/api/v1/rules")["data"]["groups"]
            found = [rule for group in groups for rule in group["rules"]]
            return found if all(rule["health"] == "ok" for rule in found) else None

        # A group is first evaluated within its interval, which is two minutes for one of them.
        loaded = len(wait_until(rules, timeout=180))
        files = [yaml.safe_load(f.read_text()) for f in (ROOT / "prometheus/rules").iterdir()]
        assert loaded == sum(len(group["rules"]) for file in files for group in file["groups"])
        seen.append(f"{len(targets)} targets of {len(jobs)} jobs up, {loaded} rules without errors")
        wait_until(lambda: stack.prometheus.query("sum(job:nginx_http_requests:rate5m)")[""] > 0)
        wait_until(lambda: "Watchdog" in stack.alerts(), timeout=120)  # resent each minute
    with row("the runbook's commands, as written") as seen:
        lines = [line for line in runbook_commands() if not line.startswith("kubectl ")]
        for line in lines:
            if line != "make compose-rollback":  # has a row of its own
                shown = run("sh", "-euc", line)
                assert "/probe?" not in line or "probe_success 1\n" in shown, (line, shown)
        seen.append(f"{len(lines)} commands, each exits with 0")


def runbook_commands() -> list[str]:
    """Return each line of the blocks `sh` in docs/runbook.md."""
    text = (ROOT / "docs/runbook.md").read_text()
    blocks = re.findall("^```sh\n(.+?)^```$", text, re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def follow(stack: Stack, replicas: int) -> str:
    """Wait until nginx and Prometheus use exactly these replicas; return the durations."""
    begin = time.monotonic()
    alive = set(stack.addresses())
    assert len(alive) == replicas

    def upstreams() -> set[str]:
        log = compose("logs", "--no-log-prefix", "--since=2s", "proxy").splitlines()
        found = [json.loads(line)["upstream"] for line in log if "/signup" in line]
        return set(re.findall(r"[\d.]+(?=:)", " ".join(found)))

    wait_until(lambda: upstreams() == alive, pause=0.5)
    nginx = time.monotonic() - begin
    ready = "on (instance) probe_success{job='signup-ready'} == 1"
    count = f"count(up{{job='signup-server'}} == 1 and {ready})"
    wait_until(lambda: stack.prometheus.query(count) == {"": replicas}, pause=0.5)
    return f"nginx updated after {nginx:.0f} s, Prometheus {time.monotonic() - begin:.0f} s"


def scale(stack: Stack) -> None:
    up = ["up", "--detach", "--wait", "--no-recreate"]
    for replicas in (4, 2):
        with under_traffic(stack, f"`up --scale server={replicas}`") as seen:
            compose(*up, "--scale", f"server={replicas}")
            seen.append(follow(stack, replicas))
    for how, at_most in (("kill", 1), ("stop", 0)):
        with under_traffic(stack, f"`docker {how}` of one of two replicas", at_most):
            run("docker", how, stack.containers("server")[0])
        with under_traffic(stack, "the replica starts again"):
            compose(*up, "--scale", "server=2")
    with under_traffic(stack, "`kill --signal HUP proxy` to reload its configuration"):
        compose("kill", "--signal", "HUP", "proxy")
    commands = ("up --detach --wait --no-deps --force-recreate server", "restart server")
    for command in (*commands, "restart proxy"):
        with under_traffic(stack, f"`{command}`", at_most=None):
            compose(*command.split())
            wait_until(stack.is_serving)
        compose(*up)


def update(stack: Stack) -> None:
    def replicas() -> set[str]:
        return set(stack.containers("server", "--all"))

    with (stack.folder / ".env").open("a") as settings:
        settings.write("REPLICAS=2\n")
    run("make", "compose-up")
    make = ["make", "compose-build", "compose-update"]
    with under_traffic(stack, "`make compose-build compose-update` with two replicas"):
        before, first = replicas(), stack.version()
        run(*make)
        assert len(replicas()) == 2 and not before & replicas()
    with under_traffic(stack, "`make compose-rollback`"):
        run("make", "compose-rollback")
        assert stack.version() == first
        assert f"signup-server:{first}" in compose("ps", "server")
    for what, (name, old, new) in BROKEN.items():
        with under_traffic(stack, f"an update to a build that {what}, twice") as seen:
            before = replicas()
            stack.edit(name, old, new)
            for _ in range(2):  # a second failure adds nothing to the first
                refused = subprocess.run(make, capture_output=True, text=True)
                assert refused.returncode and f"{first}, serve as before" in refused.stderr, refused
            seen.append(re.findall("a new replica .+", refused.stderr)[0])
            stack.edit(name, new, old)
            run("make", "compose-up")
            assert replicas() == before and stack.version() == first
    with under_traffic(stack, "`make compose-update` is killed halfway, and runs again"):
        before = replicas()
        killed = subprocess.Popen(["make", "compose-update"], start_new_session=True)
        wait_until(lambda: len(replicas()) == 4, timeout=120, pause=0.2)
        os.killpg(killed.pid, signal.SIGKILL)
        killed.wait()
        free = ["flock", "--nonblock", "docker-compose.yml", "true"]  # its child has ended as well
        wait_until(lambda: subprocess.run(free).returncode == 0, timeout=60)
        run("make", "compose-update")
        assert len(replicas()) == 2 and not before & replicas()
    with under_traffic(stack, "a password with special characters, `make compose-update`") as seen:
        old = (stack.folder / "secrets/SIGNUP_DATABASE_PASSWORD").read_text()
        stack.set_passwords(PASSWORD)
        run("make", "compose-update")
        login = "import os, psycopg2; psycopg2.connect(os.environ['DATABASE_URL'])"

        def log_in(password: str) -> str:
            """Connect from a replica; return the error."""
            command = ["docker", "compose", "exec", "-T", "-e", f"PGPASSWORD={password}", "server"]
            command += ["python", "-c", login]
            return subprocess.run(command, capture_output=True, text=True).stderr

        assert not log_in(PASSWORD) and "authentication failed" in log_in(old)
        seen.append("new password accepted, old one rejected")


def database(stack: Stack) -> None:
    with row("`stop db`, five failures, `start db`") as seen, Traffic(stack) as clients:
        wait_until(lambda: clients.count(201) >= 5)
        compose("stop", "db")
        wait_until(lambda: clients.count(500, 503) >= 5)
        compose("start", "db")
        before = clients.count(201)
        wait_until(lambda: clients.count(201) >= before + 5)
        assert all(each["RestartCount"] == 0 for each in stack.inspect().values())
        seen.append(clients)
    with row("`make compose-backup`, `down`, a new volume, `make compose-restore`, `up`") as seen:
        users = stack.query("SELECT * FROM users ORDER BY id")
        run("make", "compose-backup")
        (file,) = (stack.folder / "backups").iterdir()
        assert file.stat().st_mode & 0o777 == 0o600
        run("make", "compose-down")
        run("docker", "volume", "rm", "signup-check_db")
        restore = ("make", "compose-restore", f"FILE={file}")
        run(*restore)
        run("make", "compose-up")
        assert stack.counted_signups() == 0
        assert stack.query("SELECT * FROM users ORDER BY id") == users
        assert stack.signup(json=user("restored")).status_code == 201
        refused = subprocess.run(restore, capture_output=True, text=True)
        assert "add REPLACE=yes" in refused.stderr
        seen.append(f"{users.count('|') // 6} users as before")
    with row("an INSERT that PostgreSQL refuses"):  # `end` looks for its row in the log
        stack.query(f"ALTER TABLE users ADD CONSTRAINT r CHECK (last_name <> '{NAME}') NOT VALID")
        assert stack.signup(json=user("refused")).status_code == 500
        stack.query("ALTER TABLE users DROP CONSTRAINT r")


def https(stack: Stack) -> None:
    def renew() -> str:
        """Install a new certificate as certbot does; return it."""
        new = certify(stack.folder / "lineage")
        os.environ["RENEWED_LINEAGE"] = str(stack.folder / "lineage/tls")
        run("deploy/certificate.sh")
        return new

    def served() -> str:
        return ssl.get_server_certificate(("127.0.0.1", 443))

    with row("a certificate in nginx/tls, `make compose-up`") as seen:
        first = renew()
        run("make", "compose-up")
        assert served() == first
        stack.url = "https://127.0.0.1"
        os.environ["REQUESTS_CA_BUNDLE"] = str(stack.folder / "lineage/trusted.pem")
        answer = stack.signup(json=user("https"))
        assert answer.status_code == 201 and answer.headers["Strict-Transport-Security"]
        context = ssl.create_default_context(cafile=os.environ["REQUESTS_CA_BUNDLE"])
        context.set_alpn_protocols(["h2"])
        plain = socket.create_connection(("127.0.0.1", 443))
        with context.wrap_socket(plain, server_hostname="127.0.0.1") as connection:
            assert connection.selected_alpn_protocol() == "h2"
            seen.append(f"201 over {connection.version()}, HTTP/2")
        moved = requests.get("http://127.0.0.1/signup?a=b", allow_redirects=False)
        assert moved.headers["Location"] == "https://127.0.0.1/signup?a=b"
        seen.append(f"http: {moved.status_code}")
    with under_traffic(stack, "a new certificate, `deploy/certificate.sh`"):
        second = renew()
        wait_until(lambda: served() == second)


def burst(stack: Stack) -> None:
    replica = Client()
    replica.url = f"http://{stack.addresses()[0]}:3000"
    with row(f"{CLIENTS} clients on the proxy and {CLIENTS} on a replica for {BURST} s") as seen:
        with Traffic(stack, CLIENTS, 0) as front, Traffic(replica, CLIENTS, 0) as back:
            give_up = time.monotonic() + BURST
            peaks: dict[str, tuple[float, int]] = {}
            while time.monotonic() < give_up:
                shown = run("docker", "stats", "--no-stream", "--format", "{{json .}}")
                for line in map(json.loads, shown.splitlines()):
                    now = float(line["MemPerc"].rstrip("%")), int(line["PIDs"])
                    old = peaks.get(line["Name"], (0.0, 0))
                    peaks[line["Name"]] = max(old[0], now[0]), max(old[1], now[1])
        seen += [f"proxy: {front}", f"replica: {back}"]
        assert front.failed().keys() <= {"429"} and back.failed().keys() <= {"503"}, seen
    for name, each in stack.inspect("--status=running").items():
        memory, pids = peaks[f"signup-check-{name}"]
        limit = each["HostConfig"]["PidsLimit"]
        assert not each["State"]["OOMKilled"] and each["RestartCount"] == 0
        assert not limit or pids < limit, name
        if name.startswith(("server", "proxy", "db")):
            print(f"| ... {name} | | {memory:.0f} % of its memory, {pids} of {limit} processes |")


def end(stack: Stack) -> None:
    with row("`stop`") as seen:
        compose("stop")
        for name, each in stack.inspect().items():
            assert each["State"]["ExitCode"] == 0, (name, each["State"])
        seen.append("every container exited in time, with status 0")
    with row("every log line of the service, the proxy and PostgreSQL") as seen:
        logs = ["logs", "--no-log-prefix", "--no-color"]
        lines = compose(*logs, "server", "proxy").splitlines()
        lines = [line for line in lines if not line.startswith("signup service on ")]
        assert all(isinstance(json.loads(line), dict) for line in lines)
        plain = compose(*logs, "db").splitlines()
        each = (
            "{{range .IPAM.Config}}{{.Gateway}} {{end}}"  # the address of clients on this machine
        )
        found = run(
            "docker", "network", "inspect", f"--format={each}", "signup-check_front"
        ).split()
        gateways = "|".join(rf"\b{re.escape(gateway)}\b" for gateway in found)
        assert any("violates check constraint" in line for line in plain)
        for line in (*lines, *plain):
            assert not re.search(rf"@|example\.com|{NAME}|\bAda\b|{gateways}", line), line
        seen.append(f"{len(lines)} lines of JSON, {len(plain)} others, no personal data")


def check(own_engine: bool) -> None:
    engine.FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="drill-", dir=engine.FOLDER) as folder:
        if own_engine:
            for name, origin in engine.provide_images().items():
                print(f"{name}: {origin}", flush=True)
        stack = Stack(Path(folder), own_engine)
        images = built()
        print("\n| Step | Duration | Result |\n| --- | --- | --- |")
        try:
            start(stack, own_engine)
            for step in (front_door, outside, watched, scale, update, database, burst, https, end):
                if step is not outside or own_engine:  # else it changes the host's network
                    step(stack)
        except BaseException:
            for name, each in stack.inspect().items():
                if (health := each["State"].get("Health")) and health["Log"]:
                    print(name, health["Log"][-1]["Output"])
            print(compose("ps", "--all"), compose("logs", "--tail=5"))
            raise
        finally:
            compose("down", "--volumes", "--timeout", "20")
            run("docker", "image", "rm", *built() - images)


def main() -> None:
    if "inside" in sys.argv:
        check(own_engine=True)
    elif engine.is_available():
        check(own_engine=False)
    else:
        sys.exit(engine.run([sys.executable, "-m", "drills.compose", "inside"]))


if __name__ == "__main__":
    main()
