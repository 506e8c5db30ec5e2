"""Hosts that lack what others have: an identity, room on the disk, settings that can be seen.

h1 (ours) -- switch, etcd -- h2 (ours)
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from ipaddress import IPv4Address, ip_interface
from pathlib import Path

import pytest

from pyflannel.control.subnet_file import variables_untrusted
from tests.lab.hosts import (
    ETCD_PORT,
    PREFIX,
    SWITCH_ADDRESS,
    Host,
    Lab,
    freeze,
    lab,
    ping,
    wait_until,
)
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


def test_what_stands_on_a_full_disk_is_used(made: Lab, host: Host) -> None:
    first = made.start_daemon(host)
    saved = host.folder / "saved"
    saved.mkdir()
    for file in (host.folder / "state" / "flannel.1.json", host.subnet_file):
        shutil.copy2(file, saved)
    before = made.leases()
    host.stop(first)
    state = host.folder / "state"
    full = f"mount -t tmpfs -o size=8k none {state}\ncp {saved}/* {state}\n! echo x >{state}/more"
    flags = ("--subnet-file", str(state / "subnet.env"))
    made.start_daemon(host, *flags, wrapper=_after(full))
    assert made.leases() == before


def test_another_subnet_is_used_before_a_full_disk_takes_it(made: Lab, host: Host) -> None:
    state = host.folder / "state"
    state.mkdir()
    flags = ("--subnet-file", str(state / "subnet.env"))
    small = _after(f"mount -t tmpfs -o size=12k none {state}")
    daemon = host.processes[made.start_daemon(host, *flags, wrapper=small)]
    disk = Path(f"/proc/{daemon.pid}/root{state}")
    (subnet,) = made.leases()
    old = (disk / "subnet.env").read_text()
    with contextlib.suppress(OSError):
        (disk / "filler").write_bytes(bytes(20_000))
    freeze(daemon)
    made.etcdctl("del", f"{PREFIX}/subnets/{subnet}")
    made.etcdctl("put", f"{PREFIX}/subnets/{subnet}", '{"PublicIP":"192.168.77.99"}')
    daemon.send_signal(signal.SIGCONT)
    wait_until(lambda: "not ready (subnet-file)" in host.log.read_text(), "it says so")
    made.start_daemon(made.hosts[1])
    peer = _base(made.hosts[1])
    wait_until(lambda: ping(host, peer), "a ping from the new address")
    assert (disk / "subnet.env").read_text() == old
    (disk / "filler").unlink()
    wait_until(lambda: "cleared: subnet-file" in host.log.read_text(), "it is written")
    new = ip_interface(variables_untrusted((disk / "subnet.env").read_text())["FLANNEL_SUBNET"])
    assert f"{new.network.network_address}-24" in made.leases().keys() - {subnet}
    assert host.log.read_text().count("not ready (subnet-file)") == 1


def test_another_subnet_waits_for_the_device_to_be_back(made: Lab, host: Host) -> None:
    """Without /dev/net/tun the device that somebody deleted cannot be made anew."""
    tun = Path("/dev/net/tun")
    own = _after(f"mount -t tmpfs none {tun.parent}\nmknod {tun} c 10 200")
    daemon = host.processes[made.start_daemon(host, wrapper=own)]
    (subnet,) = made.leases()
    Path(f"/proc/{daemon.pid}/root{tun}").unlink()
    host.ip("link", "del", "flannel.1")
    wait_until(lambda: "not ready (host-network)" in host.log.read_text(), "it is missed")
    freeze(daemon)
    made.etcdctl("del", f"{PREFIX}/subnets/{subnet}")
    made.etcdctl("put", f"{PREFIX}/subnets/{subnet}", '{"PublicIP":"192.168.77.99"}')
    daemon.send_signal(signal.SIGCONT)
    wait_until(lambda: "not ready (subnet-changed)" in host.log.read_text(), "another subnet")
    made.start_daemon(made.hosts[1])
    os.mknod(f"/proc/{daemon.pid}/root{tun}", stat.S_IFCHR | 0o600, os.makedev(10, 200))
    wait_until(lambda: "cleared: host-network" in host.log.read_text(), "the device is back")
    wait_until(lambda: ping(host, _base(made.hosts[1])), "a ping from the new address")
    assert f"inet {_base(host)}/32" in host.ip("addr", "show", "flannel.1")
    assert f"{_base(host)}-24" != subnet


def test_a_full_disk_without_what_is_needed(made: Lab, host: Host) -> None:
    state = host.folder / "state"
    state.mkdir()
    full = _after(f"mount -t tmpfs -o size=4k none {state}\necho x >{state}/x")
    assert _doctor(host, full) == {
        "files": [f"{state} is on a disk that is full, so {state}/flannel.1.json cannot be written"]
    }
    index = made.start_daemon(host, wait=False, wrapper=full)
    assert host.processes[index].wait(20) == 1
    assert "cannot keep the VTEP MAC (No space left on device)" in host.log.read_text()


def test_read_only_file_system(host: Host) -> None:
    state = host.folder / "state"
    state.mkdir()
    found = _doctor(
        host, _after(f"mount -o bind {state} {state}\nmount -o remount,bind,ro {state}")
    )
    assert found["files"] == [
        f"{state} may not be written to, so {state}/flannel.1.json cannot be written"
    ]


@pytest.mark.parametrize("has_id", [True, False])
def test_a_copy_of_a_disk_gets_a_mac_of_its_own(made: Lab, host: Host, has_id: bool) -> None:
    """Copied are the machine-id, or that there is none, and the state of the first host."""
    told = made.folder / "machine-id"
    told.write_text("c0ffee\n" if has_id else "")
    wrapper = _after(f"mount --bind {told} /etc/machine-id")
    for each in made.hosts:
        (each.folder / "state").mkdir()
        kept = {"machine_id": told.read_text().strip(), "vtep_mac": MAC}
        (each.folder / "state" / "flannel.1.json").write_text(json.dumps(kept))
    other = made.hosts[1]
    for each in made.hosts:
        made.start_daemon(each, wrapper=wrapper)
    assert f"VTEP MAC of flannel.1: {MAC} (kept" in host.log.read_text()
    assert f"VTEP MAC {MAC}, kept from the last start, is that of lease" in other.log.read_text()
    wait_until(lambda: ping(host, _base(other)), "the copy is reached")
    changed = json.loads((other.folder / "state" / "flannel.1.json").read_text())["vtep_mac"]
    assert changed != MAC
    # It is the copy's for good.
    other.stop(0)
    made.start_daemon(other, wrapper=wrapper)
    assert f"VTEP MAC of flannel.1: {changed} (kept" in other.log.read_text()


def test_two_leases_of_one_mac_are_told(made: Lab, host: Host) -> None:
    for number in (1, 2):
        value = {
            "PublicIP": f"192.0.2.{number}",
            "BackendType": "vxlan",
            "BackendData": {"VNI": 1, "VtepMAC": MAC},
        }
        made.etcdctl("put", f"{PREFIX}/subnets/10.244.{number}.0-24", json.dumps(value))
    assert _doctor(host, ())["leases"] == [
        "the leases 10.244.1.0/24 at 192.0.2.1, 10.244.2.0/24 at 192.0.2.2 have one VTEP MAC, "
        f"{MAC}, as where one host is a copy of another: only one of them is reached"
    ]


def test_a_folder_in_the_place_of_the_machine_id(made: Lab, host: Host, tmp_path: Path) -> None:
    """So Docker mounts a file that the host does not have."""
    hide = f"mount -t tmpfs none {tmp_path}\ncp -a /etc {tmp_path}\nrm -f {tmp_path}/etc/machine-id"
    put = f"mkdir {tmp_path}/etc/machine-id\nmount --bind {tmp_path}/etc /etc"
    made.start_daemon(host, wrapper=_after(f"{hide}\n{put}"))
