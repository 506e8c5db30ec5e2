"""docs/docker.md, command by command: two hosts from nothing to two containers that ping.

one -- docker0 -- host1 192.0.2.11 ---+-- switch
two -- docker0 -- host2 192.0.2.12 ---+

The hosts are those of tests/lab/machine.py. Real are etcd, containerd, dockerd and their unit
files, and pip. Not real: systemd, for which tests/lab/systemctl.py stands in; apt-get, which only
looks whether the packages are there; and the registry, for which an image with Debian's static
busybox does.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path

import pytest

from tests.docs.page import blocks
from tests.lab.machine import ROOT, Machine, check_out, start_machines
from tests.lab.require import require_program, require_root

pytestmark = pytest.mark.slow

DOC = ROOT / "docs" / "docker.md"
BUSYBOX = Path("/bin/busybox")

APT_GET = """#!/bin/sh -e
for package in "$@"; do
  case $package in
  install | -y) ;;
  docker.io) command -v dockerd ;;
  *) dpkg-query -W "$package" ;;
  esac
done
"""


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
        _, found = start_machines(stack, {"host1": "192.0.2.11/24", "host2": "192.0.2.12/24"})
        for machine in found.values():
            check_out(machine)
            machine.install("apt-get", APT_GET)
        yield found


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
    addresses: dict[str, str] = {}
    for block in blocks(DOC):
        for name in block.hosts:
            commands = block.text
            machine = machines[name]
            if "docker run" in commands:
                machine.shell("docker import - busybox", stdin=_image())
            for word, address in addresses.items():
                commands = commands.replace(word, address)
            printed = machine.shell(commands)
            for container in re.findall(r"docker inspect .* (one|two)$", commands, re.M):
                addresses[f"ADDRESS-OF-{container.upper()}"] = printed.split()[-1]
            if "ping" in commands:
                assert "3 packets transmitted, 3 packets received" in printed
    assert len(set(addresses.values())) == 2
    for name, machine in machines.items():
        rules = machine.shell("iptables -t nat -S")
        assert "MASQUERADE --random-fully" in rules
        assert not re.search(r"-A POSTROUTING -s \S+ ! -o docker0 -j MASQUERADE", rules), name
