"""docs/docker.md, command by command: two hosts from nothing to two containers that ping.

one -- docker0 -- host1 192.0.2.11 ---+-- switch
two -- docker0 -- host2 192.0.2.12 ---+

Each host has process, mount and network namespaces of its own. /etc, /opt and /var/lib are overlays
of the machine's, /run is empty; all that is written is gone with the host. Real are etcd,
containerd, dockerd and their unit files, and pip. Not real: systemd, for which
tests/lab/systemctl.py stands in; apt-get, which only looks whether the packages are there; and the
registry, for which an image with Debian's static busybox does.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import pytest

from tests.lab.hosts import Host, Lab, run, wait_until
from tests.lab.require import require_program, require_root

ROOT = Path(__file__).parent.parent.parent
DOC = ROOT / "docs" / "docker.md"
STAND_IN = ROOT / "tests" / "lab" / "systemctl.py"
BUSYBOX = Path("/bin/busybox")

HOLD = """
set -e
mount --make-rprivate /
mount -t tmpfs tmpfs /run
for folder in etc opt var/lib; do
  own="$1/$folder"
  mkdir -p "$own/upper" "$own/work"
  mount -t overlay overlay -o "lowerdir=/$folder,upperdir=$own/upper,workdir=$own/work" "/$folder"
done
for folder in docker containerd; do
  mkdir -p "/var/lib/$folder"
  mount -t tmpfs tmpfs "/var/lib/$folder"
done
rm -rf /var/lib/etcd /etc/docker /opt/pyflannel
echo held
exec sleep infinity
"""

APT_GET = """#!/bin/sh -e
for package in "$@"; do
  case $package in
  install | -y) ;;
  docker.io) command -v dockerd ;;
  *) dpkg-query -W "$package" ;;
  esac
done
"""


@dataclass
class Machine:
    """A host that looks freshly installed; `shell` runs what an operator types there."""

    host: Host
    pid: int
    checkout: Path

    def shell(self, commands: str, stdin: bytes = b"") -> str:
        """Run commands, stop at the first that fails; return what they print."""
        # The package index cannot be reached from the lab's switch.
        namespaces = ("-m", "-p") if "pip install" in commands else ("-m", "-p", "-n")
        path = f"{self.checkout.parent}/bin:{os.environ['PATH']}"
        done = subprocess.run(
            ["nsenter", "-t", str(self.pid), *namespaces, "bash", "-ec", commands],
            env={**os.environ, "PATH": path},
            input=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=150,
        )
        printed = done.stdout.decode()
        assert done.returncode == 0, f"{self.host.name}:\n{commands}\n{printed}\n{self.logs()}"
        return printed

    def logs(self) -> str:
        """Return the end of what the services logged."""
        root = Path(f"/proc/{self.pid}/root/run/systemctl-started")
        return "\n".join(
            f"{path.name}:\n{path.read_text()[-2000:]}" for path in sorted(root.glob("*.log"))
        )


@pytest.fixture
def machines() -> Iterator[dict[str, Machine]]:
    require_root()
    for program in (
        "dockerd",
        "docker",
        "containerd",
        "etcd",
        "etcdctl",
        "nsenter",
        "busybox",
        "git",
    ):
        require_program(program)
    with ExitStack() as stack:
        made = Lab()
        stack.callback(made.close)
        run("mount", "-t", "tmpfs", "tmpfs", str(made.folder))
        stack.callback(run, "umount", "-l", str(made.folder))
        made.start_switch()
        found = {}
        for number in (1, 2):
            host = made.add_host()
            host.ip("addr", "flush", "dev", "eth0")
            host.ip("addr", "add", f"192.0.2.{10 + number}/24", "dev", "eth0")
            found[f"host{number}"] = _boot(host, stack)
        yield found


def _boot(host: Host, stack: ExitStack) -> Machine:
    """Hold the namespaces of a host by a process whose end is the end of all others in it."""
    # fmt: off
    holder = subprocess.Popen(
        ["nsenter", f"--net=/run/netns/{host.name}", "unshare", "-m", "-p", "-f", "--kill-child",
         "--mount-proc", "sh", "-c", HOLD, "sh", str(host.folder)],
        stdout=subprocess.PIPE, text=True,
    )
    # fmt: on
    stack.callback(holder.wait)
    stack.callback(holder.kill)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    children = Path(f"/proc/{holder.pid}/task/{holder.pid}/children")
    wait_until(lambda: bool(children.read_text().split()), "the holder's child")
    (pid,) = map(int, children.read_text().split())
    checkout = host.folder / "checkout"
    # What the index lists, as it is now: neither build products nor only what is committed.
    listed = run("git", "-C", str(ROOT), "ls-files").splitlines()
    for name in listed:
        target = checkout / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target, follow_symlinks=False)
    tools = host.folder / "bin"
    tools.mkdir()
    systemctl = f'#!/bin/sh\nexec {sys.executable} {STAND_IN} "$@"\n'
    for name, script in (("systemctl", systemctl), ("apt-get", APT_GET)):
        (tools / name).write_text(script)
        (tools / name).chmod(0o755)
    return Machine(host, pid, checkout)


def _image() -> bytes:
    """Return a root file system with busybox, for `docker import`."""
    content = BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        archive.add(BUSYBOX.resolve(), "bin/busybox")
        for name in ("sh", "sleep", "ping"):
            link = tarfile.TarInfo(f"bin/{name}")
            link.type, link.linkname = tarfile.SYMTYPE, "busybox"
            archive.addfile(link)
    return content.getvalue()


def test_docker_doc(machines: dict[str, Machine]) -> None:
    blocks = re.findall(r"^```sh((?: host[12])+)\n(.*?)^```$", DOC.read_text(), re.M | re.S)
    assert len(blocks) == DOC.read_text().count("```") // 2
    addresses: dict[str, str] = {}
    for hosts, commands in blocks:
        for name in hosts.split():
            machine = machines[name]
            if "docker run" in commands:
                machine.shell("docker import - busybox", stdin=_image())
            for word, address in addresses.items():
                commands = commands.replace(word, address)
            printed = machine.shell(f"cd {machine.checkout}\n{commands}")
            for container in re.findall(r"docker inspect .* (one|two)$", commands, re.M):
                addresses[f"ADDRESS-OF-{container.upper()}"] = printed.split()[-1]
            if "ping" in commands:
                assert "3 packets transmitted, 3 packets received" in printed
    assert len(set(addresses.values())) == 2
    for name, machine in machines.items():
        rules = machine.shell("iptables -t nat -S")
        assert "MASQUERADE --random-fully" in rules
        assert not re.search(r"-A POSTROUTING -s \S+ ! -o docker0 -j MASQUERADE", rules), name
