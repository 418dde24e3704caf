"""gunicorn's settings work as its manual says, or the start refuses them with one line."""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import pytest
import requests

from testbed import ROOT, wait_until
from testbed.database import Postgres, broken_table, count_users
from testbed.load import Scraper, Signups
from testbed.nginx import certify
from testbed.programs import free_port, is_alive, listens
from testbed.service import GUNICORN, USER, Client, Service, project_copy, refused_start

# The start of TLS 1.1: a record with a client hello of one cipher.
OLD_HELLO = bytes.fromhex("160301002d010000290302" + "00" * 32 + "000002002f0100")
PROCESS_METRICS = {
    f"process_{name}"
    for name in ("cpu_seconds_total", "resident_memory_bytes", "open_fds", "start_time_seconds")
}


@pytest.fixture
def project() -> Iterator[Path]:
    with project_copy() as project:
        yield project


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


@pytest.mark.parametrize("options", [["gthread", "--threads=4"], ["sync"]])
def test_other_worker_classes_count_exactly_too(url: str, options: list[str]) -> None:
    kind, *more = options
    with Service(f"--worker-class={kind}", *more, DATABASE_URL=url, WEB_CONCURRENCY="2") as service:
        assert f"Using worker: {kind}" in service.log()
        service.wait_for(signup_workers=2, signup_worker_starts_total=2)
        with Scraper(service):  # no counter decreases
            for starts in (3, 4):
                enough = service.answers.total() + 200
                with Signups(service) as load:
                    wait_until(lambda: service.answers.total() > enough)
                assert not load.unanswered
                service.check_equalities(count_users(url))
                os.kill(service.worker_pids()[0], signal.SIGKILL)
                service.wait_for(
                    signup_workers=2, signup_worker_starts_total=starts, database_connections_max=25
                )
                service.check_equalities(count_users(url))


@pytest.mark.parametrize(("seconds", "header"), [(0, "close"), (1, "keep-alive")])
def test_gunicorn_cmd_args_set_workers_and_keep_alive(url: str, seconds: int, header: str) -> None:
    arguments = f"--workers 3 --keep-alive {seconds}"
    with Service(DATABASE_URL=url, WEB_CONCURRENCY="2", GUNICORN_CMD_ARGS=arguments) as service:
        service.wait_for(signup_workers=3, database_connections_max=25)
        with service.connect() as client:
            ask(client)
            assert answer(client).headers["Connection"] == header
            assert client.recv(1) == b""  # closed, within this socket's timeout


def test_max_requests_loses_no_request(url: str) -> None:
    with Service("--max-requests=20", DATABASE_URL=url, WEB_CONCURRENCY="2") as service:
        with Signups(service) as load:
            wait_until(lambda: service.boots() >= 2 + 4)
        assert not load.unanswered
        service.check_equalities(count_users(url))
        starts = "signup_worker_starts_total"  # a scrape may be a worker's last request
        wait_until(lambda: service.metrics().get_value(starts) == service.boots())


def test_access_log_and_error_log_are_json_lines(url: str, tmp_path: Path) -> None:
    errors = tmp_path / "errors"
    person = {"email": "secret.person@example.com", "first_name": "Zebedee", "last_name": "Quux"}
    headers = {"X-Request-ID": "mine-1", "User-Agent": "Agent/7", "Referer": "http://referer/"}
    options = ("--access-logfile=-", f"--error-logfile={errors}")
    with Service(*options, DATABASE_URL=url, WEB_CONCURRENCY="1") as service:
        wait_until(lambda: service.log().count("\n") == 2)  # /healthz at the start
        for method, path, sent in (
            ("POST", "/signup", {"json": person, "headers": headers}),
            ("POST", "/signup?email=secret.person@example.com", {"json": person}),
            ("GET", "/secret.person@example.com/Zebedee", {"auth": ("secret.person", "Quux")}),
            ("ZEBEDEE", "/signup", {}),
            ("GET", "/metrics", {"cookies": {"name": "Quux"}}),
        ):
            requests.request(method, service.url + path, timeout=30, **sent)
        with broken_table(url):
            assert service.signup(json=USER).status_code == 500
        service.stop()
        start, _, *access = service.log().splitlines()
    assert start.startswith("signup service on ")
    lines = json_lines("\n".join(access))
    assert [(line["method"], line["path"], line["status"]) for line in lines] == [
        ("POST", "/signup", 201),
        ("POST", "/signup", 409),
        ("GET", "other", 404),
        ("other", "/signup", 405),
        ("GET", "/metrics", 200),
        ("POST", "/signup", 500),
    ]
    assert lines[0]["request_id"] == "mine-1"
    for line in lines:
        assert line.keys() == {"time", "request_id", "method", "path", "status", "duration"}
        assert isinstance(line["duration"], float) and line["request_id"]
    words = ("secret", "example.com", "Zebedee", "ZEBEDEE", "Quux", "127.0.0.1", "Agent", "referer")
    assert not [word for word in (*words, "Basic") if word in "".join(access)]
    messages = [line["message"] for line in json_lines(errors.read_text())]
    assert messages[0].startswith("Starting gunicorn")
    assert [text for text in messages if text.startswith("database: UndefinedColumn: ")]
    assert "request failed" in messages
    assert messages[-1].startswith("Shutting down")


def edit(file: Path, old: str, new: str) -> None:
    code = file.read_text()
    assert old in code
    file.write_text(code.replace(old, new))


def test_reload_serves_changed_code_and_survives_a_syntax_error(url: str, project: Path) -> None:
    views = project / "signup/views.py"
    code = views.read_text()
    with Service("--reload", project=project, DATABASE_URL=url, WEB_CONCURRENCY="1") as service:
        assert service.get("/").json() == {"message": "welcome"}
        service.signup(json=USER)
        views.write_text("def (")
        wait_until(lambda: service.get("/").status_code == 500)
        views.write_text(code.replace('"welcome"', '"welcome back"'))
        wait_until(lambda: "welcome back" in service.get("/").text)
        service.wait_for(signup_workers=1, signup_worker_starts_total=3)
        assert service.signup(json=USER).status_code == 409
        service.check_equalities(rows=1)


def test_hup_serves_changed_code(url: str, project: Path) -> None:
    with Service(project=project, DATABASE_URL=url, WEB_CONCURRENCY="2") as service:
        service.wait_for(database_connections_max=25)
        service.signup(json=USER)
        edit(project / "signup/views.py", '"welcome"', '"welcome back"')
        assert service.get("/").json() == {"message": "welcome"}
        service.reload()
        assert service.get("/").json() == {"message": "welcome back"}
        assert service.signup(json=USER).status_code == 409
        service.check_equalities(rows=1)


def test_configuration_file_works_from_another_folder(url: str, tmp_path: Path) -> None:
    option = f"--config={ROOT / 'gunicorn.conf.py'}"
    with Service(option, project=tmp_path, DATABASE_URL=url, WEB_CONCURRENCY="2") as service:
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


def as_nobody(project: Path, prefix: str = "", **env: Any) -> Service:
    """Return the service in `project`, a project_copy, with workers that run as nobody."""
    for folder in (project.parent, project):
        folder.chmod(0o755)
    env["PYTHONPATH"] = str(Path(requests.__file__).parent.parent)
    service = Service("--user=nobody", project=project, **env)
    line = f'shift; exec {prefix} {python_for("nobody")} "$@"'
    service._command = ["sh", "-c", line, "sh", *service._command]
    return service


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


def test_signups_over_a_unix_socket_are_counted(url: str, tmp_path: Path) -> None:
    path, body = str(tmp_path / "socket"), json.dumps(USER)
    head = f"POST /signup HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    with (
        Service(f"--bind=unix:{path}", DATABASE_URL=url, WEB_CONCURRENCY="1") as service,
        socket.socket(socket.AF_UNIX) as client,
    ):
        client.connect(path)
        client.sendall((head + body).encode())
        service.answers[answer(client).status] += 1
        assert service.answers == {201: 1}
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


def test_usr2_upgrade_leaves_a_master_that_works_as_the_old_one(url: str) -> None:
    """Their metrics are apart: tests/test_slots.py."""
    with Service(DATABASE_URL=url, WEB_CONCURRENCY="2") as service:
        service.signup(json=USER)
        old = service.worker_pids()
        service.process.send_signal(signal.SIGUSR2)
        wait_until(lambda: service.log().count("signup service on") == 2 and service.boots() == 4)
        (new,) = set(service.worker_pids()) - set(old)  # a child of the old one, but no worker
        service.wait_for(signup_workers=2)
        assert service.stop() == 0
        service.wait_for(
            signup_workers=2, signup_worker_starts_total=2, database_connections_max=25
        )
        assert service.signup(json=USER).status_code == 409
        os.kill(new, signal.SIGHUP)
        service.wait_for(signup_workers=2, signup_worker_starts_total=4)
        os.kill(new, signal.SIGTERM)
        wait_until(lambda: not is_alive(new))
        assert "Traceback" not in service.log()


def test_env_option_sets_variables_across_a_reload(url: str) -> None:
    options = (f"--env=DATABASE_URL={url}", "--env=DATABASE_MAX_CONNECTIONS=4")
    # An empty DATABASE_URL counts as unset, and the test starts no embedded PostgreSQL.
    with Service(*options, DATABASE_URL="", WEB_CONCURRENCY="2") as service:
        assert service.signup(json=USER).status_code == 201
        service.wait_for(signup_workers=2, database_connections_max=4)
        service.reload()
        service.wait_for(signup_workers=2, database_connections_max=4)
        service.check_equalities(rows=1)


@pytest.mark.parametrize(
    ("option", "cause"),
    [
        ("--preload", "preload_app is set"),
        ("--statsd-host=127.0.0.1:8125", "gunicorn's setting statsd_host is not supported"),
        ("--control-socket=ctl", "gunicorn's setting control_socket is not supported"),
        ("--control-socket-mode=0o660", "gunicorn's setting control_socket_mode is not supported"),
        ("--dirty-app=x:y", "gunicorn's setting dirty_apps is not supported"),
        ("--log-syslog-prefix=x", "gunicorn's setting syslog_prefix is not supported"),
        ("--env=PROMETHEUS_MULTIPROC_DIR=x", "set it in the environment, not with --env"),
    ],
)
def test_setting_that_can_not_work_is_refused(
    url: str, tmp_path: Path, option: str, cause: str
) -> None:
    pid = tmp_path / "pid"
    done = refused_start(option, f"--pid={pid}", DATABASE_URL=url)
    assert done.stderr.count(cause) == 1 and "Traceback" not in done.stderr
    assert not pid.exists()


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
    client, port = Client(), free_port()
    client.url = f"http://127.0.0.1:{port}"
    reader, closed = os.pipe()
    os.close(reader)
    errors = {"full disk": os.open("/dev/full", os.O_WRONLY), "closed pipe": closed}
    error = errors.get(what, subprocess.DEVNULL)
    options = [what] if what not in errors else []
    command = [*GUNICORN, f"--bind=127.0.0.1:{port}", *options, "app:app"]
    env = {"DATABASE_URL": url}
    with subprocess.Popen(command, cwd=ROOT, env=env, stderr=error) as process:
        try:
            wait_until(lambda: listens(port) or process.poll())
            assert client.signup(json=USER).status_code == 201
        finally:
            process.terminate()
    for number in errors.values():
        os.close(number)


@pytest.mark.needs("openssl")
@pytest.mark.parametrize("worker_class", ["gevent", "gthread", "sync"])
def test_signups_over_tls_and_junk_beside_them(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, worker_class: str
) -> None:
    certify(tmp_path)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "trusted.pem"))
    files = (f"--certfile={tmp_path}/tls/fullchain.pem", f"--keyfile={tmp_path}/tls/privkey.pem")
    options = (f"-k={worker_class}", *files)
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
