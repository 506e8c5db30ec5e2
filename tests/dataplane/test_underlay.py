"""The underlay's sockets and the instance lock, opened for real in namespaces.

lone namespace   eth0 192.0.2.11/24 === namespace "far"   eth0 192.0.2.12/24
"""

from __future__ import annotations

import gc
import json
import os
import select
import socket
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address

import pytest

from pyflannel.dataplane.refusal import Refusal
from pyflannel.dataplane.route import IPAddress
from pyflannel.dataplane.underlay import Underlay
from tests.lab.hosts import Namespace, run
from tests.lab.inside import inside, lone_namespace
from tests.lab.require import require_program, require_root

HERE, FAR = IPv4Address("192.0.2.11"), IPv4Address("192.0.2.12")
ROUTED = IPv4Address("198.51.100.11")
HERE_V6, FAR_V6 = IPv6Address("2001:db8::11"), IPv6Address("2001:db8::12")
LINK_LOCAL, FAR_LINK_LOCAL = IPv6Address("fe80::11"), IPv6Address("fe80::12")
PORT = 8472


@pytest.fixture
def pair() -> Iterator[tuple[Namespace, Namespace]]:
    require_root()
    require_program("ip")
    with lone_namespace() as here, lone_namespace() as far:
        # fmt: off
        run("ip", "link", "add", "eth0", "netns", here.name, "type", "veth",
            "peer", "name", "eth0", "netns", far.name)
        # fmt: on
        for namespace, address in ((here, HERE), (far, FAR)):
            namespace.ip("addr", "add", f"{address}/24", "dev", "eth0")
            namespace.ip("link", "set", "eth0", "up")
        yield here, far


def open_underlay(namespace: Namespace, address: IPAddress = HERE, name: str = "eth0") -> Underlay:
    return inside(namespace, lambda: Underlay.open(name, address, PORT, 4))


def refused(namespace: Namespace, address: IPAddress = HERE, name: str = "eth0") -> str:
    """Return the refusal; it must leave no descriptor behind."""
    gc.collect()  # what earlier tests of this process have left open
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(Refusal) as caught:
        open_underlay(namespace, address, name)
    assert len(os.listdir("/proc/self/fd")) == before
    return str(caught.value)


def held(fd: int) -> socket.socket:
    """Return a socket object for a descriptor that somebody else closes."""
    return socket.socket(fileno=os.dup(fd))


def readable(underlay: Underlay) -> socket.socket:
    """Return the receive socket that something has come by."""
    ready, _, _ = select.select(underlay.receive_fds, [], [], 10)
    assert len(ready) == 1
    return held(ready[0])


def test_it_receives_on_every_address_and_sends_from_its_own(
    pair: tuple[Namespace, Namespace],
) -> None:
    here, far = pair
    ours, theirs = open_underlay(here), open_underlay(far, FAR)
    try:
        for fd in ours.receive_fds:
            with held(fd) as receive:
                assert receive.getsockname() == ("0.0.0.0", PORT)
        ports = set()
        for fd in ours.send_fds:
            with held(fd) as send:
                address, port = send.getsockname()
                assert address == str(HERE)
                ports.add(port)
                send.sendto(b"x", (str(FAR), PORT))
            with readable(theirs) as other:
                assert other.recvfrom(10) == (b"x", (address, port))
        assert len(ports) == 4
        assert PORT not in ports
    finally:
        ours.close()
        theirs.close()


def test_sockets_are_set_as_the_kernels_device_sends(pair: tuple[Namespace, Namespace]) -> None:
    pair[0].exec("sysctl", "-qw", "net.ipv4.ip_default_ttl=65")
    ours = open_underlay(pair[0])
    try:
        for fd in ours.send_fds:
            assert not os.get_blocking(fd)
            with held(fd) as send:
                assert send.getsockopt(socket.IPPROTO_IP, socket.IP_TTL) == 65
                assert send.getsockopt(socket.IPPROTO_IP, 10) == 0  # IP_MTU_DISCOVER: DF is clear
        for fd in ours.receive_fds:
            assert not os.get_blocking(fd)
            with held(fd) as receive:
                assert receive.getsockopt(socket.IPPROTO_IP, socket.IP_RECVTOS) == 1
    finally:
        ours.close()


def _sent(ours: Underlay, theirs: Underlay, address: IPAddress) -> str:
    """Have a datagram sent to an address of theirs; return the one that it comes from."""
    with held(ours.send_fds[0]) as send:
        send.sendto(b"x", (str(address), PORT))
        with readable(theirs) as other:
            octets, source = other.recvfrom(10)
        assert octets == b"x"
        assert source[1] == send.getsockname()[1]
    return str(source[0])


def test_the_routes_choose_by_which_interface_is_sent(pair: tuple[Namespace, Namespace]) -> None:
    here, far = pair
    here.ip("addr", "add", str(ROUTED), "dev", "lo")
    far.ip("route", "add", str(ROUTED), "via", str(HERE))
    ours, theirs = open_underlay(here, ROUTED, "lo"), open_underlay(far, FAR)
    try:
        assert _sent(ours, theirs, FAR) == str(ROUTED)
    finally:
        ours.close()
        theirs.close()


def test_a_link_local_address_is_sent_from_by_its_interface(
    pair: tuple[Namespace, Namespace],
) -> None:
    here, far = pair
    for namespace, address in ((here, LINK_LOCAL), (far, FAR_LINK_LOCAL)):
        namespace.ip("addr", "add", f"{address}/64", "dev", "eth0", "nodad")
    ours, theirs = open_underlay(here, LINK_LOCAL), open_underlay(far, FAR_LINK_LOCAL)
    try:
        _sent(ours, theirs, FAR_LINK_LOCAL)
    finally:
        ours.close()
        theirs.close()


def test_an_address_that_is_still_checked_for_duplicates_is_sent_from(
    pair: tuple[Namespace, Namespace],
) -> None:
    here, far = pair
    here.exec("sysctl", "-qw", "net.ipv6.conf.eth0.dad_transmits=20")
    far.ip("addr", "add", f"{FAR_V6}/64", "dev", "eth0", "nodad")
    here.ip("addr", "add", f"{HERE_V6}/64", "dev", "eth0")
    (link,) = json.loads(far.ip("-j", "link", "show", "eth0"))
    neighbour = (str(FAR_V6), "lladdr", link["address"], "dev", "eth0")
    here.ip("neigh", "add", *neighbour, "nud", "permanent")
    ours, theirs = open_underlay(here, HERE_V6), open_underlay(far, FAR_V6)
    try:
        assert _sent(ours, theirs, FAR_V6) == str(HERE_V6)
        assert "tentative" in here.ip("addr", "show", "to", str(HERE_V6))
    finally:
        ours.close()
        theirs.close()
    absent = IPv6Address("2001:db8::99")
    assert f"{absent} is not an address of this host" in refused(here, absent)


def test_what_comes_to_a_send_socket_is_dropped(pair: tuple[Namespace, Namespace]) -> None:
    here, far = pair
    ours = open_underlay(here)
    stranger = inside(far, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    try:
        with held(ours.send_fds[0]) as send:
            stranger.sendto(b"junk", send.getsockname())
            stranger.sendto(b"good", (str(HERE), PORT))
            with readable(ours) as receive:
                assert receive.recv(10) == b"good"
            with pytest.raises(BlockingIOError):
                send.recv(10, socket.MSG_DONTWAIT)
    finally:
        stranger.close()
        ours.close()


def test_a_second_one_is_refused_until_the_first_is_closed(
    pair: tuple[Namespace, Namespace],
) -> None:
    here, _ = pair
    ours = open_underlay(here)
    assert refused(here).startswith(
        f"another pyflannel-udp ({_own_name()} (pid {os.getpid()})) already serves UDP port {PORT}"
    )
    ours.close()
    ours.close()
    open_underlay(here).close()


def _own_name() -> str:
    with open("/proc/self/comm") as comm:
        return comm.read().strip()


def test_a_taken_port_is_refused_with_its_holder(pair: tuple[Namespace, Namespace]) -> None:
    here, far = pair
    with inside(here, lambda: socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)) as holder:
        holder.bind(("::", PORT))
        assert f"port {PORT} is held by {_own_name()} (pid {os.getpid()})" in refused(here)
        open_underlay(far, FAR).close()
    open_underlay(here).close()


def test_a_port_taken_by_a_kernel_device_is_refused_with_its_name(
    pair: tuple[Namespace, Namespace],
) -> None:
    here, _ = pair
    vxlan = ("type", "vxlan", "id", "9", "dev", "eth0", "dstport", "8472")
    here.ip("link", "add", "other0", *vxlan)
    here.ip("link", "set", "other0", "up")
    with pytest.raises(Refusal, match="held by the kernel vxlan device other0"):
        inside(here, lambda: Underlay.open("eth0", HERE, PORT, 4, vxlan_devices=["other0"]))
    assert "taken by the kernel or by a process that cannot be seen" in refused(here)


def test_an_interface_or_address_that_is_not_there_is_refused(
    pair: tuple[Namespace, Namespace],
) -> None:
    here, _ = pair
    absent = "the underlay interface nope0 does not exist"
    assert absent in refused(here, LINK_LOCAL, name="nope0")
    assert "203.0.113.9 is not an address of this host" in refused(here, IPv4Address("203.0.113.9"))
    open_underlay(here).close()
