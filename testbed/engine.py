"""A private Docker engine, and stand-ins for images that can't be pulled.

The engine and Compose are Debian packages in a tree built by debootstrap. They share separate
mount, network and PID namespaces with the command that uses them. When the command exits, its
containers, bridges, packet filter rules and mounts disappear with the namespaces. slirp4netns
connects the namespaces to the package indexes. The tree and the images are cached in FOLDER.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from . import ROOT, wait_until
from .programs import PATH, missing

FOLDER = ROOT / ".engine"
TREE = FOLDER / "tree"
PROGRAMS = ("debootstrap", "slirp4netns", "ip")
# Debian testing has current versions. Stand-ins start from BASE; the engine's tree adds ENGINE.
SUITE = "testing"
BASE = "ca-certificates,curl,python3,python3-venv,python-is-python3,wget"
ENGINE = "docker.io docker-cli docker-compose docker-buildx iptables"
STAND_INS = {
    "python": "python",
    "postgres": "postgres",
    "nginx": "nginx",
    "prom/prometheus": "prometheus",
    "prom/alertmanager": "alertmanager",
    "prom/blackbox-exporter": "blackbox",
    "nginx/nginx-prometheus-exporter": "nginx-exporter",
}  # any other image gets a placeholder
# What pip in a stand-in needs from the host to reach a package index.
HOST_FILES = [Path("/etc/pip.conf"), Path("/etc/ssl/certs/ca-certificates.crt")]
CGROUP = f"signup-engine-{os.getpid()}"

INSTALL = """
mount -t proc proc "$1/proc"
mount --rbind /dev "$1/dev"
cp /etc/resolv.conf "$1/etc/resolv.conf"
DEBIAN_FRONTEND=noninteractive chroot "$1" apt-get install -qq --yes --no-install-recommends $2
"""

# Process 1 of the namespaces: mounts the tree, starts the engine, then runs the command.
RUN = r"""
tree=$1 folder=$2 root=$3 cgroup=$4
shift 4
mount --bind "$tree" "$tree"
mount -t proc proc "$tree/proc"
mount --rbind /dev "$tree/dev"
mount -t sysfs sysfs "$tree/sys"
mount --rbind /sys/fs/cgroup "$tree/sys/fs/cgroup"
mount -t tmpfs tmpfs "$tree/run"
mount -t tmpfs tmpfs "$tree/tmp"
mkdir -p "$tree$root"
mount --bind "$root" "$tree$root"
echo "nameserver 10.0.2.3" >"$tree/etc/resolv.conf" # slirp4netns
ip link set lo up
until ip route | grep -q ^default; do sleep 0.1; done
export DOCKER_HOST="unix://$folder/docker.sock" PATH="$folder/bin:$PATH"
# pivot_root, not chroot: a process that enters a container's mount namespace leaves a chroot.
unshare --mount sh -euc 'cd "$0"; pivot_root . mnt; umount -l mnt; exec "$@"' "$tree" \
    dockerd --host="$DOCKER_HOST" --data-root="$folder/data" --exec-root=/run/docker \
    --pidfile=/run/docker.pid --cgroup-parent="/$cgroup" --log-level=warn \
    --exec-opt=native.cgroupdriver=cgroupfs </dev/null >"$folder/dockerd.log" 2>&1 &
engine=$!
until docker version >/dev/null 2>&1; do
    kill -0 $engine || { tail "$folder/dockerd.log" >&2; exit 1; }
    sleep 0.1
done
status=0
"$@" || status=$?
kill $engine
wait $engine || true
exit $status
"""

# A wrapper, since the client is inside the tree.
CLIENT = """#!/bin/sh
exec chroot {tree} /bin/sh -c 'cd "$0" && exec /usr/bin/docker "$@"' "$PWD" "$@"
"""


def is_available() -> bool:
    """Return whether `docker` reaches an engine (DOCKER_HOST or the default) and has Compose."""
    commands = (["docker", "version"], ["docker", "compose", "version"])
    return shutil.which("docker") is not None and all(
        subprocess.run(command, capture_output=True).returncode == 0 for command in commands
    )


def run(command: Sequence[str]) -> int:
    """Run `command` with a private engine as DOCKER_HOST; return its exit status.

    Exits with a one-line message if a program or root is missing.
    """
    if reason := missing(*PROGRAMS):
        sys.exit(f"no Docker engine found, and cannot start one: {reason}")
    if os.geteuid() != 0:
        sys.exit("no Docker engine found, and starting one needs root")
    _make_tree()
    namespaces = ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
    script = ["sh", "-euc", RUN, "sh", str(TREE), str(FOLDER), str(ROOT), CGROUP, *command]
    die_too = ["setpriv", "--pdeathsig", "KILL"]  # even if this process is killed
    environment = os.environ | {"PATH": PATH}
    with subprocess.Popen([*die_too, *namespaces, *script], env=environment) as process:
        try:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
            child = wait_until(lambda: process.poll() is not None or children.read_text().strip())
            slirp = ["slirp4netns", "--configure", "--mtu=65520", "--disable-host-loopback"]
            with subprocess.Popen(
                [*die_too, *slirp, str(child), "tap0"],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            ) as network:
                try:
                    return process.wait()
                finally:
                    network.kill()
        finally:
            process.kill()
            process.wait()
            _remove_cgroups()


def _make_tree() -> None:
    FOLDER.mkdir(exist_ok=True)
    if not (FOLDER / "ready").exists():
        shutil.rmtree(TREE, ignore_errors=True)
        print("debootstrap: installing Debian packages and the engine", flush=True)
        options = ["--variant=minbase", f"--include={BASE}"]
        _quietly("debootstrap", *options, SUITE, str(TREE))
        _quietly("tar", "-C", str(TREE), "-cf", str(FOLDER / "base.tar"), ".")
        _quietly("unshare", "--mount", "sh", "-euc", INSTALL, "sh", str(TREE), ENGINE)
        (FOLDER / "ready").touch()
    (FOLDER / "bin").mkdir(exist_ok=True)
    (FOLDER / "bin/docker").write_text(CLIENT.format(tree=TREE))
    (FOLDER / "bin/docker").chmod(0o755)


def _quietly(*command: str) -> str:
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PATH": PATH},
    )
    if done.returncode:
        sys.exit(f"failed: {' '.join(command)[:200]}\n{done.stdout[-2000:]}")
    return done.stdout


def _remove_cgroups() -> None:
    top = Path("/sys/fs/cgroup")
    for folder in sorted(top.glob(f"**/{CGROUP}/**/"), reverse=True):
        folder.rmdir()


def provide_images() -> dict[str, str]:
    """Pull or build each image of docker-compose.yml and the Dockerfile; return their origins."""
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    names = {s["image"] for s in compose["services"].values() if "build" not in s}
    names |= set(re.findall(r"^FROM (\S+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE))
    return {name: "pulled" if _is_pulled(name) else _make_stand_in(name) for name in sorted(names)}


def _is_pulled(name: str) -> bool:
    return not subprocess.run(["docker", "pull", "--quiet", name], capture_output=True).returncode


def _make_stand_in(name: str) -> str:
    base = "signup-stand-in"
    if subprocess.run(["docker", "image", "inspect", base], capture_output=True).returncode:
        _quietly("docker", "import", str(FOLDER / "base.tar"), base)
    context = FOLDER / "stand_ins"
    shutil.rmtree(context, ignore_errors=True)
    shutil.copytree(ROOT / "testbed/stand_ins", context)
    (context / "host").mkdir()
    for path in filter(Path.exists, HOST_FILES):
        shutil.copy(path, context / "host")
    image = name.rpartition(":")[0]
    target = f"--target={STAND_INS.get(image, 'placeholder')}"
    _quietly("docker", "build", target, f"--tag={name}", f"--build-arg=IMAGE={name}", str(context))
    if image not in STAND_INS:
        return "a placeholder"
    show = ("docker", "run", "--rm", "--network=none", "--entrypoint=cat", name, "/version")
    return f"Debian's {_quietly(*show).strip()}"
