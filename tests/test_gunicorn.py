"""gunicorn's settings work as its manual says, or the start refuses them with one line."""

import contextlib
import json
import os
import pwd
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

import pytest
import requests

from testbed import ROOT, wait_until
from testbed.database import Postgres, broken_table, count_users
from testbed.load import Scraper, Signups
from testbed.programs import free_port, is_alive
from testbed.service import GUNICORN, USER, Service, project_copy, refused_start

CONFIG = ROOT / "gunicorn.conf.py"
# The start of TLS 1.1: a record with a client hello of one cipher.
OLD_HELLO = bytes.fromhex("160301002d010000290302" + "00" * 32 + "000002002f0100")
PROCESS_METRICS = {
    f"process_{name}"
    for name in ("cpu_seconds_total", "resident_memory_bytes", "open_fds", "start_time_seconds")
}
ACCESS_FIELDS = {"time", "request_id", "method", "path", "status", "duration"}


class Wrapped(Service):
    """The service, started by a shell command that receives the usual command as "$@"."""

    def __init__(self, line: str, *options: str, project: Path = ROOT, **env: str) -> None:
        super().__init__(*options, project=project, **env)  # type: ignore[arg-type]
        self._command = ["sh", "-c", line, "sh", *self._command]


@pytest.fixture
def project() -> Iterator[Path]:
    with project_copy() as project:
        yield project


def sign_up(service: Service, name: str) -> None:
    """Send valid, invalid and duplicate signups from concurrent clients; each gets a response."""
    answered = service.answers.total()
    with Signups(service, name=name) as load:
        wait_until(lambda: service.answers.total() > answered + 200)
    assert not load.unanswered
    assert service.answers.keys() == {201, 400, 409}


def ask(client: socket.socket, path: str = "/healthz") -> None:
    client.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())


def answer(client: socket.socket) -> HTTPResponse:
    """Read one whole response, whether or not the connection stays open."""
    response = HTTPResponse(client)
    response.begin()
    response.read()
    return response


def json_lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("options", [["gevent"], ["gthread", "--threads=4"], ["sync"]])
def test_every_worker_class_counts_exactly(url: str, options: list[str]) -> None:
    kind, *more = options
    with Service(f"--worker-class={kind}", *more, DATABASE_URL=url, WEB_CONCURRENCY="2") as service:
        assert f"Using worker: {kind}" in service.log()
        check_counts_across_a_kill(service, url)


def check_counts_across_a_kill(service: Service, url: str) -> None:
    """Send signups before and after a worker is killed: counts are exact, and none decreases."""
    service.wait_for(signup_workers=2, signup_worker_starts_total=2)
    with Scraper(service):
        sign_up(service, "before")
        service.check_equalities(count_users(url))
        os.kill(service.worker_pids()[0], signal.SIGKILL)
        service.wait_for(
            signup_workers=2, signup_worker_starts_total=3, database_connections_max=25
        )
        service.check_equalities(count_users(url))
        sign_up(service, "after")
        service.check_equalities(count_users(url))


def test_keep_alive_1_closes_an_idle_connection(url: str) -> None:
    with Service("--keep-alive=1", DATABASE_URL=url, WEB_CONCURRENCY="2") as service:
        with service.connect() as client:
            ask(client)
            assert answer(client).headers["Connection"] == "keep-alive"
            assert client.recv(1) == b""  # within this socket's timeout
        assert service.signup(json=USER).status_code == 201


def test_max_requests_loses_no_request(url: str) -> None:
    with Service("--max-requests=20", DATABASE_URL=url, WEB_CONCURRENCY="2") as service:
        with Signups(service) as load:
            wait_until(lambda: service.boots() >= 2 + 4)
        assert not load.unanswered
        service.check_equalities(count_users(url))
        starts = "signup_worker_starts_total"  # a scrape may be a worker's last request
        wait_until(lambda: service.metrics().get_value(starts) == service.boots())


def test_access_log_on_standard_output_and_error_log_in_a_file_are_json_lines(
    url: str, tmp_path: Path
) -> None:
    access, errors = tmp_path / "access", tmp_path / "errors"
    options = ("--access-logfile=-", f"--error-logfile={errors}")
    line = f'exec "$@" >{access}'
    with Wrapped(line, *options, DATABASE_URL=url, WEB_CONCURRENCY="2") as service:
        wait_until(lambda: len(access.read_text().splitlines()) == 1)  # /healthz at the start
        check_access_lines(service, access)
        with broken_table(url):
            assert service.signup(json=USER).status_code == 500
        service.stop()
        messages = [line["message"] for line in json_lines(errors.read_text())]
        assert messages[0].startswith("Starting gunicorn")
        assert [text for text in messages if text.startswith("database: UndefinedColumn: ")]
        assert "request failed" in messages
        assert messages[-1].startswith("Shutting down")
        (line,) = service.log().splitlines()
        assert line.startswith("signup service on ")


def check_access_lines(service: Service, file: Path) -> None:
    """Check that each request adds one line to `file`, with the documented fields only."""
    known = len(file.read_text().splitlines())
    person = {"email": "secret.person@example.com", "first_name": "Zebedee", "last_name": "Quux"}
    headers = {"X-Request-ID": "mine-1", "User-Agent": "Agent/7", "Referer": "http://referer/"}
    for method, path, options in (
        ("POST", "/signup", {"json": person, "headers": headers}),
        ("POST", "/signup?email=secret.person@example.com", {"json": person}),
        ("GET", "/secret.person@example.com/Zebedee", {"auth": ("secret.person", "Quux")}),
        ("ZEBEDEE", "/signup", {}),
        ("GET", "/metrics", {"cookies": {"name": "Quux"}}),
    ):
        requests.request(method, service.url + path, timeout=30, **options)
    wait_until(lambda: file.read_text().count("\n") == known + 5)
    lines = json_lines(file.read_text())[known:]
    seen = sorted((line["method"], line["path"], line["status"]) for line in lines)
    assert seen == [
        ("GET", "/metrics", 200),
        ("GET", "other", 404),
        ("POST", "/signup", 201),
        ("POST", "/signup", 409),
        ("other", "/signup", 405),
    ]
    assert "mine-1" in {line["request_id"] for line in lines}
    for line in lines:
        assert line.keys() == ACCESS_FIELDS
        assert isinstance(line["duration"], float)
        assert line["request_id"]
    words = ("secret.person", "example.com", "Zebedee", "ZEBEDEE", "Quux", "127.0.0.1", "Agent")
    text = file.read_text()
    assert not [word for word in (*words, "referer", "Basic") if word in text]


def change_welcome(project: Path) -> None:
    views = project / "signup" / "views.py"
    code = views.read_text()
    assert '"welcome"' in code
    views.write_text(code.replace('"welcome"', '"welcome back"'))


def test_reload_serves_changed_code(url: str, project: Path) -> None:
    with Service("--reload", project=project, DATABASE_URL=url, WEB_CONCURRENCY="1") as service:
        assert service.get("/").json() == {"message": "welcome"}
        service.signup(json=USER)
        change_welcome(project)
        wait_until(lambda: service.get("/").json() == {"message": "welcome back"})
        service.wait_for(signup_workers=1, signup_worker_starts_total=2)
        assert service.signup(json=USER).status_code == 409
        service.check_equalities(rows=1)


def test_reload_survives_a_syntax_error(url: str, project: Path) -> None:
    views = project / "signup" / "views.py"
    code = views.read_text()
    with Service("--reload", project=project, DATABASE_URL=url, WEB_CONCURRENCY="1") as service:
        views.write_text("def (")
        wait_until(lambda: service.get("/").status_code == 500)
        views.write_text(code)
        wait_until(lambda: service.get("/").status_code == 200)


def test_hup_serves_changed_code(url: str, project: Path) -> None:
    with Service(project=project, DATABASE_URL=url, WEB_CONCURRENCY="2") as service:
        service.wait_for(database_connections_max=25)
        service.signup(json=USER)
        change_welcome(project)
        assert service.get("/").json() == {"message": "welcome"}
        service.reload()
        for _ in range(10):
            assert service.get("/").json() == {"message": "welcome back"}
        assert service.signup(json=USER).status_code == 409
        service.check_equalities(rows=1)


def test_preload_is_refused(url: str) -> None:
    done = refused_start("--preload", DATABASE_URL=url)
    (line,) = filter(None, done.stderr.splitlines())
    assert "preload_app is set" in line


@pytest.mark.parametrize("options", [(), (f"--chdir={ROOT}",)])
def test_configuration_file_works_from_another_folder(
    url: str, tmp_path: Path, options: tuple[str, ...]
) -> None:
    options = (*options, f"--config={CONFIG}")
    with Service(*options, project=tmp_path, DATABASE_URL=url, WEB_CONCURRENCY="2") as service:
        assert service.signup(json=USER).status_code == 201
        service.wait_for(signup_workers=2, database_connections_max=25)
        service.check_equalities(rows=1)


def test_start_without_the_configuration_file_is_refused(url: str, tmp_path: Path) -> None:
    options = (f"--pythonpath={ROOT}", "--no-control-socket")
    done = refused_start(*options, folder=tmp_path, DATABASE_URL=url)
    assert "gunicorn.conf.py was not read" in done.stderr


def python_for(user: str) -> str:
    """Find a Python of this version that `user` can run, or skip: `user` may not reach this one."""
    code, version = "import sys; print(sys.version_info[:2])", str(sys.version_info[:2])
    for program in (sys.executable, "/usr/bin/python3"):
        command = [program, "-c", code]
        with contextlib.suppress(OSError):
            found = subprocess.run(command, capture_output=True, text=True, user=user, cwd="/")
            if found.stdout.strip() == version:
                return program
    pytest.skip(f"needs a Python {version} that {user} can run")


def as_nobody(project: Path, prefix: str = "", **env: str) -> Wrapped:
    """Return the service in `project`, a project_copy, with workers that run as nobody."""
    for folder in (project.parent, project):
        folder.chmod(0o755)
    line = f'shift; exec {prefix} {python_for("nobody")} "$@"'
    env["PYTHONPATH"] = str(Path(requests.__file__).parent.parent)
    return Wrapped(line, "--user=nobody", project=project, **env)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may change a worker's user")
def test_workers_of_another_user_count_exactly(url: str, project: Path) -> None:
    nobody = pwd.getpwnam("nobody")
    with as_nobody(project, DATABASE_URL=url, WEB_CONCURRENCY="2") as service:
        service.wait_for(signup_workers=2, database_connections_max=25)
        pids = service.worker_pids()
        assert {Path(f"/proc/{pid}").stat().st_uid for pid in pids} == {nobody.pw_uid}
        check_counts_across_a_kill(service, url)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount /proc, and change users")
@pytest.mark.parametrize(
    ("option", "hidden"),
    [("subset=pid", {"process_start_time_seconds"}), ("hidepid=2", PROCESS_METRICS)],
)
def test_process_metrics_that_proc_hides_are_left_out(
    url: str, project: Path, option: str, hidden: set[str]
) -> None:
    mounted = f"unshare --mount sh -c 'mount -t proc -o {option} proc /proc && exec \"$@\"' sh"
    if subprocess.run(f"{mounted} true", shell=True).returncode:
        pytest.skip("this root may not mount /proc, as in a container")
    group = "--group=nogroup"  # root's sees all of /proc
    env = {"DATABASE_URL": url, "WEB_CONCURRENCY": "2", "GUNICORN_CMD_ARGS": group}
    with as_nobody(project, mounted, **env) as service:
        service.wait_for(signup_workers=2)
        assert service.signup(json=USER).status_code == 201
        service.check_equalities(rows=1)
        assert PROCESS_METRICS - {name for name, _ in service.metrics()} == hidden


def test_signups_over_a_unix_socket_are_counted(url: str) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        path = f"{folder}/signup.sock"
        with Service(f"--bind=unix:{path}", DATABASE_URL=url, WEB_CONCURRENCY="2") as service:
            client = HTTPConnection("localhost")
            with socket.socket(socket.AF_UNIX) as client.sock:
                client.sock.settimeout(30)
                client.sock.connect(path)
                for status in (201, 409):
                    client.request("POST", "/signup", json.dumps(USER))
                    response = client.getresponse()
                    assert response.status == status
                    assert response.read()
                    service.answers[status] += 1
            service.check_equalities(rows=1)


def test_worker_connections_limits_accepted_connections(url: str) -> None:
    with (
        Service("--worker-connections=5", DATABASE_URL=url, WEB_CONCURRENCY="1") as service,
        contextlib.ExitStack() as stack,
    ):
        first, *others = [stack.enter_context(service.connect()) for _ in range(5)]
        for client in (first, *others):
            ask(client)
            assert answer(client).status == 200
        sixth = stack.enter_context(service.connect())
        ask(sixth)
        for _ in range(50):
            ask(first)
            assert answer(first).status == 200
        assert select.select([sixth], [], [], 0)[0] == []
        others[0].close()
        assert answer(sixth).status == 200


@pytest.mark.parametrize("budget", [25, 2])
def test_ttin_and_ttou_change_the_number_of_workers(
    postgres: Postgres, url: str, budget: int
) -> None:
    with Service(
        DATABASE_URL=url,
        DATABASE_MAX_CONNECTIONS=str(budget),
        WEB_CONCURRENCY="2",
        METRICS_SAMPLE_INTERVAL="0.05",
    ) as service:

        def is_reached(workers: int, low: int, high: int) -> bool:
            now = service.metrics()
            most = now.get_value("database_connections_max")
            assert now.get_value("database_connections", state="open") <= most
            assert len(postgres.connections(url)) <= budget + share
            return now.get_value("signup_workers") == workers and low <= most <= high

        share = -(-budget // 2)
        with Signups(service) as load:
            wait_until(lambda: is_reached(2, budget, budget))
            service.process.send_signal(signal.SIGTTIN)
            wait_until(lambda: is_reached(3, budget + 1, budget + share))
            service.process.send_signal(signal.SIGTTOU)
            wait_until(lambda: is_reached(2, budget - 1, budget))
        assert not load.unanswered
        assert service.metrics().get_value("signup_worker_starts_total") == 3
        service.check_equalities(count_users(url))


def test_hup_loses_no_request(url: str) -> None:
    with Service(DATABASE_URL=url, WEB_CONCURRENCY="2") as service:
        service.wait_for(signup_workers=2, database_connections_max=25)
        with Signups(service) as load:
            service.reload()
            service.wait_for(
                signup_workers=2, signup_worker_starts_total=4, database_connections_max=24
            )
        assert not load.unanswered
        assert service.boots() == 4
        service.check_equalities(count_users(url))


def test_usr2_upgrade_keeps_the_metrics_folders_apart(url: str) -> None:
    with Service(DATABASE_URL=url, WEB_CONCURRENCY="2") as service:
        service.signup(json=USER)
        service.wait_for(signup_workers=2)
        folder, old = service.metrics_folder(), service.worker_pids()
        service.process.send_signal(signal.SIGUSR2)
        wait_until(lambda: service.log().count("signup service on") == 2 and service.boots() == 4)
        # The new master is a child of the old one, but not a worker. Both serve requests.
        wait_until(
            lambda: all(service.metrics().get_value("signup_workers") == 2 for _ in range(10))
        )
        (new,) = set(service.worker_pids()) - set(old)
        assert folder.exists()
        assert service.stop() == 0
        assert not folder.exists()
        for _ in range(10):
            now = service.metrics()
            assert now.total("signup_requests_total") == 0
            assert now.get_value("signup_workers") == 2
        assert service.signup(json=USER).status_code == 409
        # The new master has taken over: it replaces its workers, and stops as the old one did.
        os.kill(new, signal.SIGHUP)
        service.wait_for(signup_workers=2, signup_worker_starts_total=4)
        os.kill(new, signal.SIGTERM)
        wait_until(lambda: not is_alive(new))
        assert "Traceback" not in service.log()


def test_gunicorn_cmd_args_are_applied_and_keep_alive_0_closes_each_connection(url: str) -> None:
    with Service(
        DATABASE_URL=url, WEB_CONCURRENCY="2", GUNICORN_CMD_ARGS="--workers 3 --keep-alive 0"
    ) as service:
        service.wait_for(signup_workers=3, database_connections_max=25)
        with service.connect() as client:
            ask(client)
            assert answer(client).headers["Connection"] == "close"
            assert client.recv(1) == b""


def test_env_option_sets_variables_across_a_reload(url: str) -> None:
    options = (f"--env=DATABASE_URL={url}", "--env=DATABASE_MAX_CONNECTIONS=4")
    # An empty DATABASE_URL counts as unset, and the test starts no embedded PostgreSQL.
    with Service(*options, DATABASE_URL="", WEB_CONCURRENCY="2") as service:
        assert service.signup(json=USER).status_code == 201
        service.wait_for(signup_workers=2, database_connections_max=4)
        service.reload()
        service.wait_for(signup_workers=2, database_connections_max=4)
        service.check_equalities(rows=1)


def test_make_run_treats_an_empty_web_concurrency_as_unset(url: str) -> None:
    line = f'exec {sys.executable} -m testbed.postgres "$@"'
    with Wrapped(line, DATABASE_URL=url, WEB_CONCURRENCY="") as service:
        service.wait_for(signup_workers=max(2, len(os.sched_getaffinity(0))))
        assert service.stop() == 0


def test_make_run_refuses_a_web_concurrency_that_is_no_number() -> None:
    command = [sys.executable, "-m", "testbed.postgres", *GUNICORN, "app:app"]
    env = {"WEB_CONCURRENCY": "two"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    what = "use 1 to 256 (an integer)"
    assert done.stderr == f"WEB_CONCURRENCY: 'two' is not allowed: {what}\n"


@pytest.mark.parametrize(
    ("option", "name"),
    [
        ("--statsd-host=127.0.0.1:8125", "statsd_host"),
        ("--control-socket=ctl", "control_socket"),
        ("--control-socket-mode=0o660", "control_socket_mode"),
        ("--dirty-app=x:y", "dirty_apps"),
        ("--log-syslog-prefix=x", "syslog_prefix"),
    ],
)
def test_setting_without_effect_is_refused(
    url: str, tmp_path: Path, option: str, name: str
) -> None:
    pid = tmp_path / "pid"
    done = refused_start(option, f"--pid={pid}", DATABASE_URL=url)
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("{")]
    assert line == f"gunicorn's setting {name} is not supported"
    assert not pid.exists()


def test_env_option_cant_move_the_metrics(url: str, tmp_path: Path) -> None:
    done = refused_start(f"--env=PROMETHEUS_MULTIPROC_DIR={tmp_path}", DATABASE_URL=url)
    reason = "Reason: PROMETHEUS_MULTIPROC_DIR: set it in the environment, not with --env"
    assert f'"message": "{reason}"' in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("query", ["", "?sslmode=no"])
def test_daemon_logs_why_it_waits_or_did_not_start(tmp_path: Path, query: str) -> None:
    pid, errors, metrics = tmp_path / "pid", tmp_path / "errors", tmp_path / "metrics"
    options = ("--daemon", f"--pid={pid}", f"--error-logfile={errors}", "--bind=127.0.0.1:0")
    # A word of the message may be the password: nothing is replaced in it.
    env = {"DATABASE_URL": f"postgresql://signup:on@127.0.0.1:1/signup{query}"}
    env["PROMETHEUS_MULTIPROC_DIR"] = str(metrics)
    subprocess.run([*GUNICORN, *options, "app:app"], cwd=ROOT, env=env, check=True, timeout=60)
    wait_until(lambda: errors.exists() and errors.read_text().count("\n") == 2)
    message = json_lines(errors.read_text())[1]["message"]
    if query:
        assert "the database can't be used: OperationalError: 127.0.0.1 1: invalid" in message
    else:
        assert "reached: OperationalError: 127.0.0.1 1: Connection refused; trying" in message
        os.kill(int(pid.read_text()), signal.SIGTERM)
    wait_until(lambda: not pid.exists() and not list(metrics.iterdir()))


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM])
def test_signal_ends_a_start_that_waits(tmp_path: Path, number: int) -> None:
    env = {"DATABASE_URL": "postgresql://127.0.0.1:1/", "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    command = [*GUNICORN, "--bind=127.0.0.1:0", f"--pid={tmp_path / 'pid'}", "app:app"]
    with subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE) as process:
        assert process.stderr
        next(line for line in process.stderr if b"trying again each second" in line)
        for early in (signal.SIGTTIN, signal.SIGTTOU, signal.SIGUSR1, signal.SIGUSR2, number):
            process.send_signal(early)
        assert process.stderr.read() == b""
    assert process.returncode == 128 + number
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("what", ["full disk", "closed pipe", "--reuse-port"])
def test_start_that_logs_to_nowhere_or_has_no_listener_serves(url: str, what: str) -> None:
    reader, error = os.pipe()
    os.close(reader)
    if what != "closed pipe":
        os.close(error)
        error = os.open("/dev/full" if what == "full disk" else "/dev/null", os.O_WRONLY)
    port = free_port()
    options = [f"--bind=127.0.0.1:{port}", *([what] if what[0] == "-" else [])]

    def signs_up() -> bool:
        assert process.poll() is None
        with contextlib.suppress(requests.ConnectionError):
            address = f"http://127.0.0.1:{port}/signup"
            return requests.post(address, json=USER, timeout=30).status_code in (201, 409)
        return False

    command, env = [*GUNICORN, *options, "app:app"], {"DATABASE_URL": url}
    with subprocess.Popen(command, cwd=ROOT, env=env, stderr=error) as process:
        os.close(error)
        try:
            wait_until(signs_up)
        finally:
            process.terminate()


def test_upgrade_header_is_ignored(url: str) -> None:
    headers = {"Connection": "Upgrade", "Upgrade": "websocket"}
    with Service(DATABASE_URL=url, WEB_CONCURRENCY="1") as service:
        assert service.signup(json=USER, headers=headers).status_code == 201
        assert service.get("/healthz", headers=headers).status_code == 200


@pytest.mark.skipif(not shutil.which("openssl"), reason="needs the program openssl")
@pytest.mark.parametrize("worker_class", ["gevent", "gthread", "sync"])
def test_signups_over_tls_and_junk_beside_them(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, worker_class: str
) -> None:
    cert, key = tmp_path / "cert", tmp_path / "key"
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=signup"
        f" -addext subjectAltName=IP:127.0.0.1 -keyout {key} -out {cert}"
    )
    subprocess.run(command.split(), check=True, capture_output=True)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(cert))
    options = (f"-k={worker_class}", f"--certfile={cert}", f"--keyfile={key}")
    with Service(*options, DATABASE_URL=url, WEB_CONCURRENCY="1") as service:
        assert service.url.startswith("https://")
        assert service.signup(json=USER).status_code == 201
        started = time.monotonic()
        for junk in (b"", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01", OLD_HELLO) * 10:
            # As a load balancer's check, or a lost client. The service may hang up at any moment.
            with service.connect() as client, contextlib.suppress(OSError):
                client.sendall(junk)
                if junk:
                    client.shutdown(socket.SHUT_WR)
                    while client.recv(4096):
                        pass
        assert service.signup(json=USER).status_code == 409
        service.check_equalities(rows=1)
        seconds = time.monotonic() - started
        assert service.stop() == 0
        lines = [line for line in service.log().splitlines() if "signup service on" not in line]
        messages = [json.loads(line)["message"] for line in lines]
        assert messages.count("Invalid request") <= 1 + seconds
