"""Hosts that lack what others have: an identity, room on the disk, settings that can be seen.

h1 (ours) -- switch, etcd -- h2 (ours)
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from ipaddress import IPv4Address, ip_interface

import pytest

from tests.lab.hosts import ETCD_PORT, PREFIX, SWITCH_ADDRESS, Host, Lab, lab
from tests.lab.require import require_program, require_root

MAC = "0a:00:00:00:00:77"


@pytest.fixture(scope="module")
def made() -> Iterator[Lab]:
    require_root()
    for program in ("ip", "ethtool", "etcd", "etcdctl", "ping", "unshare"):
        require_program(program)
    with lab(2) as made:
        made.put_config()
        yield made


@pytest.fixture
def host(made: Lab) -> Iterator[Host]:
    """The first of two hosts on which nothing has run yet."""
    made.etcdctl("del", "--prefix", f"{PREFIX}/subnets/")
    yield made.hosts[0]
    for host in made.hosts:
        for index in range(len(host.processes)):
            host.stop(index)
        host.processes.clear()
        host.ip("link", "del", "flannel.1", check=False)
        shutil.rmtree(host.folder)
        host.folder.mkdir()


def _after(script: str) -> tuple[str, ...]:
    """Return a wrapper that runs a script in a mount namespace of the command's own."""
    return ("unshare", "-m", "sh", "-ec", f'{script}\nexec "$@"', "sh")


def _base(host: Host) -> IPv4Address:
    base = ip_interface(host.subnet_env()["FLANNEL_SUBNET"]).network.network_address
    assert isinstance(base, IPv4Address)
    return base


def _doctor(host: Host, wrapper: tuple[str, ...]) -> dict[str, list[str]]:
    """Return the sentences by check, but for those about what this machine has not."""
    # fmt: off
    done = subprocess.run(
        ["ip", "netns", "exec", host.name, *wrapper, sys.executable, "-m", "pyflannel", "doctor",
         "--json", "--iface", "eth0", "--etcd-endpoints", f"http://{SWITCH_ADDRESS}:{ETCD_PORT}",
         "--control-dir", str(host.folder), "--state-dir", str(host.folder / "state"),
         "--subnet-file", str(host.subnet_file)],
        capture_output=True, text=True, timeout=60,
    )
    # fmt: on
    assert not done.stderr
    found: dict[str, list[str]] = {}
    for finding in json.loads(done.stdout)["findings"]:
        if finding["check"] not in ("vteps", "bridge"):
            found.setdefault(finding["check"], []).append(finding["sentence"])
    return found


def test_settings_that_are_hidden_are_not_missed(made: Lab, host: Host) -> None:
    hidden = _after("mount -t proc -o subset=pid proc /proc")
    assert not _doctor(host, hidden)
    made.start_daemon(host, wrapper=hidden)
    text = host.log.read_text()
    assert "forwards no" not in text
    assert "br_netfilter" not in text
