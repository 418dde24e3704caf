"""A network of its own for a test: only loopback, and a name server that never responds.

For root on Linux. The test itself moves there, unlike with `unshare`: it reaches what it starts.
"""

import contextlib
import ctypes
import os
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .programs import find_program

NAME = "db.example"
FILES = {  # of /etc
    "hosts": f"127.0.0.1 {NAME}\n",
    "nsswitch.conf": "hosts: files dns\n",  # not systemd-resolved, which keeps the real network
    "resolv.conf": "nameserver 127.0.0.1\n",
}
CLONE_FS, CLONE_NEWNS, CLONE_NEWNET = 0x200, 0x20000, 0x40000000  # from <sched.h>
LIBC = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def namespace() -> Iterator[Path]:
    """Move this thread, and all that it starts, to a network and a mount namespace of their own.

    Yields a folder with the FILES that are in /etc there. It is temporary, and any user can read
    it. The namespaces disappear with their last process.
    """
    here = Path.cwd()
    with (
        Path("/proc/thread-self/ns/net").open() as network,
        Path("/proc/thread-self/ns/mnt").open() as mounts,
        tempfile.TemporaryDirectory(prefix="signup-test-", dir="/tmp") as folder,
    ):
        Path(folder).chmod(0o755)
        call("unshare", CLONE_NEWNS | CLONE_NEWNET)
        try:
            run("mount", "--make-rprivate", "/")  # the other namespace must not see the next mounts
            run("ip", "link", "set", "lo", "up")
            for name, text in FILES.items():
                Path(folder, name).write_text(text)
                mount(Path(folder, name), f"/etc/{name}")
            with socket.socket(type=socket.SOCK_DGRAM) as server:
                server.bind(("127.0.0.1", 53))
                yield Path(folder)
        finally:
            call("unshare", CLONE_FS)  # setns refuses while threads share this one's folder
            call("setns", network.fileno(), CLONE_NEWNET)
            call("setns", mounts.fileno(), CLONE_NEWNS)
            os.chdir(here)


def mount(source: Path, target: str) -> None:
    """Replace `target` by `source`, in this namespace alone."""
    run("mount", "--bind", str(source), target)


def run(name: str, *arguments: str) -> None:
    subprocess.run([str(find_program(name)), *arguments], check=True)


def call(name: str, *arguments: int) -> None:
    """Call a function of libc; Python has these two since 3.12."""
    if LIBC[name](*arguments):
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
