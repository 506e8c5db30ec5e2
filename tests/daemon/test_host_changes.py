"""What changes on a host is repaired or told to the peers within a second.

c1 -- h1 (ours) --+
                  +-- switch, etcd
c2 -- h2 (ours) --+
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import select
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from ipaddress import IPv4Network
from pathlib import Path

import pytest

from tests.lab.hosts import Host, Lab, container_address, freeze, is_reached, lab, ping, wait_until
from tests.lab.require import require_program, require_root

pytestmark = pytest.mark.alone

LIMIT_SECONDS = 1.0


@pytest.fixture(scope="module")
def nodes() -> Iterator[Lab]:
    require_root()
    for program in ("ip", "ethtool", "etcd", "etcdctl", "ping"):
        require_program(program)
    with lab(2) as made:
        made.put_config()
        for host in made.hosts:
            made.start_daemon(host)
            made.add_container(host)
        wait_until(lambda: _reaches(made), "a ping")
        yield made


def _within_a_second(change: Callable[[], object], is_well: Callable[[], bool]) -> None:
    """Do something to the host; all must be well again in time."""
    change()
    wait_until(is_well, "well again", LIMIT_SECONDS)


def _reaches(nodes: Lab) -> bool:
    first, second = nodes.hosts
    assert first.container is not None
    return ping(first.container, container_address(second), "-W", "0.2")


def _device(host: Host) -> object:
    """The device as others see it: all but its index and counters."""
    (link,) = json.loads(host.ip("-d", "-j", "addr", "show", "flannel.1"))
    addresses = [
        (x["local"], x["prefixlen"], x["scope"]) for x in link["addr_info"] if x["family"] == "inet"
    ]
    return link["mtu"], link["txqlen"], "UP" in link["flags"], link["linkinfo"], addresses


def _routes(host: Host) -> str:
    return host.ip("route", "show", "dev", "flannel.1")


def _state(host: Host) -> object:
    return _device(host), _routes(host)


def _subnet(host: Host) -> IPv4Network:
    return IPv4Network(host.subnet_env()["FLANNEL_SUBNET"], strict=False)


DAMAGES = (
    ("link", "del", "flannel.1"),
    ("link", "set", "flannel.1", "down"),
    ("link", "set", "flannel.1", "mtu", "1200"),
    ("addr", "flush", "dev", "flannel.1"),
    ("route", "flush", "dev", "flannel.1"),
)


@pytest.mark.parametrize("words", DAMAGES, ids=" ".join)
def test_what_somebody_does_to_our_device_is_undone(nodes: Lab, words: tuple[str, ...]) -> None:
    host = nodes.hosts[0]
    before, leases = _state(host), nodes.leases()
    _within_a_second(
        lambda: host.ip(*words),
        lambda: "flannel.1" in host.ip("link") and _state(host) == before,
    )
    wait_until(lambda: _reaches(nodes), "a ping", LIMIT_SECONDS)
    assert nodes.leases() == leases


def test_renamed_device_is_made_anew_and_no_other_is_left(nodes: Lab) -> None:
    host = nodes.hosts[0]
    before = _state(host)
    host.ip("link", "set", "flannel.1", "down")
    _within_a_second(
        lambda: host.ip("link", "set", "flannel.1", "name", "renamed0"),
        lambda: "flannel.1" in host.ip("link") and _state(host) == before,
    )
    assert "renamed0" not in host.ip("link")
    wait_until(lambda: _reaches(nodes), "a ping", LIMIT_SECONDS)


PIDFD_GETFD, EPOLL_CTL_ADD = 438, 1


def _wait_set_of_the_packet_thread(pid: int) -> int:
    """Return the number of the epoll descriptor with a TUN queue whose key is 0."""
    for entry in Path(f"/proc/{pid}/fdinfo").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            told = entry.read_text()
            for number in re.findall(r"^tfd: +(\d+) .* data: +0 ", told, re.MULTILINE):
                if os.readlink(f"/proc/{pid}/fd/{number}") == "/dev/net/tun":
                    return int(entry.name)
    raise AssertionError("no packet thread waits")


def _end_packet_threads(host: Host) -> None:
    """Let the thread that waits for the TUN see an error there: a pipe without a reader."""
    libc = ctypes.CDLL(None, use_errno=True)
    pid = host.processes[0].pid
    reader, writer = os.pipe()
    os.close(reader)
    process = os.pidfd_open(pid)
    wait_set = libc.syscall(PIDFD_GETFD, process, _wait_set_of_the_packet_thread(pid), 0)
    assert wait_set >= 0, os.strerror(ctypes.get_errno())
    ended = "forwarding on flannel.1 has ended"
    before = host.log.read_text().count(ended)
    # struct epoll_event: the events, padding on some machines, and the key, 0.
    event = (ctypes.c_uint32 * 4)(select.EPOLLIN)
    assert libc.epoll_ctl(wait_set, EPOLL_CTL_ADD, writer, event) == 0
    host.wait_for_log(ended, before + 1)
    for fd in (wait_set, process, writer):
        os.close(fd)


def test_forwarding_goes_on_after_the_packet_threads_have_ended(nodes: Lab) -> None:
    host = nodes.hosts[0]
    before, again = _state(host), "forwarding again on flannel.1"
    times = host.log.read_text().count(again)
    _end_packet_threads(host)
    wait_until(lambda: _reaches(nodes), "a ping", LIMIT_SECONDS)
    host.wait_for_log(again, times + 1)
    assert _state(host) == before and host.processes[0].poll() is None


def test_mtu_of_the_interface_is_carried_on(nodes: Lab) -> None:
    host = nodes.hosts[0]
    for outer in ("1400", "1500"):
        inner = int(outer) - 50
        _within_a_second(
            lambda: host.ip("link", "set", "eth0", "mtu", outer),  # noqa: B023 called at once
            lambda: (
                f"mtu {inner} " in host.ip("link", "show", "flannel.1")  # noqa: B023 called at once
                and host.subnet_env()["FLANNEL_MTU"] == str(inner)  # noqa: B023 called at once
            ),
        )
    wait_until(lambda: _reaches(nodes), "a ping", LIMIT_SECONDS)


def test_smaller_mtu_on_the_way_to_a_peer_becomes_that_of_its_route(nodes: Lab) -> None:
    host, peer = nodes.hosts
    before = _state(host)
    way = (f"{peer.address}/32", "dev", "eth0", "mtu", "1300")
    _within_a_second(
        lambda: host.ip("route", "add", *way),
        lambda: f"{_subnet(peer)} via {_subnet(peer)[0]} onlink mtu 1250" in _routes(host),
    )
    assert host.container is not None
    target = str(container_address(peer))
    refused = host.container.exec("ping", "-c", "1", "-M", "do", "-s", "1300", target, check=False)
    assert f"From {host.subnet_env()['FLANNEL_SUBNET'].split('/')[0]}" in refused
    assert "mtu = 1250" in refused
    assert is_reached(host.container, container_address(peer), "-M", "do", "-s", "1222")
    _within_a_second(lambda: host.ip("route", "del", *way), lambda: _state(host) == before)


def test_interface_down_and_up_costs_only_the_time_between(nodes: Lab) -> None:
    host = nodes.hosts[0]
    before = _state(host)
    host.ip("link", "set", "eth0", "down")
    assert not _reaches(nodes)
    assert _state(host) == before
    _within_a_second(lambda: host.ip("link", "set", "eth0", "up"), lambda: _reaches(nodes))
    assert _state(host) == before


def _readvertised(nodes: Lab, address: str) -> bool:
    host = nodes.hosts[0]
    subnet = _subnet(host)
    lease = nodes.leases().get(f"{subnet.network_address}-{subnet.prefixlen}")
    return lease is not None and lease["PublicIP"] == address


def test_new_address_is_advertised_and_sent_from(nodes: Lab) -> None:
    host = nodes.hosts[0]
    before, subnet = _state(host), _subnet(host)
    for old, new in (("192.168.77.11", "192.168.77.111"), ("192.168.77.111", "192.168.77.11")):
        host.ip("addr", "del", f"{old}/24", "dev", "eth0")
        _within_a_second(
            lambda: host.ip("addr", "add", f"{new}/24", "dev", "eth0"),  # noqa: B023 called at once
            lambda: _readvertised(nodes, new) and _reaches(nodes),  # noqa: B023 called at once
        )
        assert (_state(host), _subnet(host)) == (before, subnet)


def test_new_address_is_advertised_as_soon_as_etcd_answers(nodes: Lab) -> None:
    host, etcd = nodes.hosts[0], nodes.switch.processes[nodes.etcd or 0]
    noticed = "sending from 192.168.77.111"
    before = host.log.read_text().count(noticed)
    freeze(etcd)
    try:
        host.ip("addr", "del", "192.168.77.11/24", "dev", "eth0")
        host.ip("addr", "add", "192.168.77.111/24", "dev", "eth0")
        host.wait_for_log(noticed, times=before + 1)
    finally:
        etcd.send_signal(signal.SIGCONT)
    # What waits for an answer of etcd gives up after 3 s, and asks again after up to 2 s.
    wait_until(lambda: _readvertised(nodes, "192.168.77.111"), "told to the peers", 15)
    host.ip("addr", "del", "192.168.77.111/24", "dev", "eth0")
    host.ip("addr", "add", "192.168.77.11/24", "dev", "eth0")
    wait_until(lambda: _readvertised(nodes, "192.168.77.11"), "told to the peers", LIMIT_SECONDS)
    assert "somebody else" not in host.log.read_text()


def _carries(nodes: Lab, name: str) -> bool:
    """Whether the first host is ready, and by this interface."""
    status = nodes.hosts[0].ask("status")
    return not status["reasons"] and status["devices"][0]["interface"] == name


def test_address_that_moves_to_a_bridge_is_followed(nodes: Lab) -> None:
    host, leases = nodes.hosts[0], nodes.leases()
    before, address = _state(host), f"{host.address}/24"
    host.ip("link", "add", "br0", "type", "bridge")
    host.ip("addr", "del", address, "dev", "eth0")
    host.ip("link", "set", "eth0", "master", "br0")
    host.ip("link", "set", "br0", "up")
    host.ip("addr", "add", address, "dev", "br0")
    wait_until(lambda: _carries(nodes, "br0"), "carried by br0")
    wait_until(lambda: _reaches(nodes), "a ping")
    assert (_state(host), nodes.leases()) == (before, leases)
    host.wait_for_log("the next start will end: no interface for the underlay: interface eth0 has")
    assert f"br0 {host.address}" in host.log.read_text()
    host.ip("link", "set", "br0", "mtu", "1400")
    wait_until(lambda: "mtu 1350 " in host.ip("link", "show", "flannel.1"), "the bridge's MTU")
    host.ip("link", "del", "br0")
    host.ip("addr", "add", address, "dev", "eth0")
    wait_until(lambda: _carries(nodes, "eth0") and _state(host) == before, "carried by eth0")
    wait_until(lambda: _reaches(nodes), "a ping")
    assert nodes.leases() == leases


def test_interface_that_is_renamed_is_followed(nodes: Lab) -> None:
    host, leases = nodes.hosts[0], nodes.leases()
    before = _state(host)
    for old, new in (("eth0", "wan0"), ("wan0", "eth0")):
        host.ip("link", "set", old, "down")
        host.ip("link", "set", old, "name", new)
        host.ip("link", "set", new, "up")
        wait_until(lambda: _carries(nodes, new), f"carried by {new}")  # noqa: B023 called at once
        wait_until(lambda: _reaches(nodes), "a ping")
        assert (_state(host), nodes.leases()) == (before, leases)


@pytest.mark.parametrize("last", ["link", "address"])
def test_interface_that_is_plugged_anew_is_used_again(nodes: Lab, last: str) -> None:
    """Its address is there before it is up, or comes later, as DHCP's does."""
    host, switch = nodes.hosts[0], nodes.switch
    before, number = _state(host), 1
    host.ip("link", "del", "eth0")
    # fmt: off
    host.ip("link", "add", "eth0", "type", "veth", "peer", "name", f"h{number}", "netns",
            switch.name)
    # fmt: on
    for namespace, name in ((host, "eth0"), (switch, "h1")):
        namespace.exec("ethtool", "-K", name, *nodes.underlay.every_end)
    switch.ip("link", "set", "h1", "master", "br0", "up")
    steps = {
        "address": ("addr", "add", f"{host.address}/24", "dev", "eth0"),
        "link": ("link", "set", "eth0", "up"),
    }
    final = steps.pop(last)
    for words in steps.values():
        host.ip(*words)
    if last == "address":
        # Until then the kernel tells of the link again and again, and each time all is looked at.
        settled = ("-6", "addr", "show", "dev", "eth0", "scope", "link", "-tentative")
        wait_until(lambda: "fe80" in host.ip(*settled), "IPv6 has settled")
        host.wait_for_log("eth0 has no usable IPv4 address")
    _within_a_second(lambda: host.ip(*final), lambda: _reaches(nodes))
    assert _state(host) == before


def test_changes_that_the_kernel_could_not_tell_are_found(nodes: Lab) -> None:
    host = nodes.hosts[0]
    before = _state(host)
    batch = host.folder / "routes"
    batch.write_text("".join(f"route add 10.99.{i >> 8}.{i & 255} dev lo\n" for i in range(20000)))
    daemon = host.processes[0]
    freeze(daemon)
    try:
        host.ip("-batch", str(batch))
        host.ip("route", "flush", "dev", "flannel.1")
    finally:
        daemon.send_signal(signal.SIGCONT)
    wait_until(lambda: _state(host) == before, "well again", LIMIT_SECONDS)
    host.wait_for_log("more changed on this host")
    wait_until(lambda: _reaches(nodes), "a ping", LIMIT_SECONDS)
