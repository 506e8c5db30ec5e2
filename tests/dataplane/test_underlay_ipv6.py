"""The sockets of the underlay, in the network namespace of the test: options and refusals."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address

import pytest

from pyflannel.dataplane.refusal import Refusal
from pyflannel.dataplane.route import IPAddress
from pyflannel.dataplane.underlay import Underlay
from tests.dataplane.test_underlay import held, readable
from tests.lab.require import require_root

LOOPBACK: dict[int, IPAddress] = {4: IPv4Address("127.0.0.1"), 6: IPv6Address("::1")}
IPV6_MTU_DISCOVER, IPV6_AUTOFLOWLABEL, UDP_NO_CHECK6_TX = 23, 70, 101


@pytest.fixture
def port() -> int:
    require_root()
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(params=[4, 6])
def opened(request: pytest.FixtureRequest, port: int) -> Iterator[Underlay]:
    underlay = Underlay.open("lo", LOOPBACK[request.param], port, 2)
    yield underlay
    underlay.close()


def test_sockets_of_one_family(opened: Underlay, port: int) -> None:
    with held(opened.receive_fds[0]) as receive, held(opened.send_fds[0]) as send:
        assert receive.family == send.family
        assert receive.getsockname()[:2] == (
            "0.0.0.0" if receive.family == socket.AF_INET else "::",
            port,
        )
        assert send.getsockname()[0] == str(LOOPBACK[4 if send.family == socket.AF_INET else 6])
        send.sendto(b"x", (send.getsockname()[0], port))
        with readable(opened) as reached:
            payload, ancillary, _, source = reached.recvmsg(16, 256)
        assert payload == b"x"
        assert source[:2] == send.getsockname()[:2]
        kinds = {(level, kind) for level, kind, _ in ancillary}
        assert kinds & {
            (socket.IPPROTO_IP, socket.IP_TOS),
            (socket.IPPROTO_IPV6, socket.IPV6_TCLASS),
        }


def test_ipv6_is_sent_as_the_kernels_device_does(port: int) -> None:
    underlay = Underlay.open("lo", LOOPBACK[6], port, 1)
    try:
        with held(underlay.send_fds[0]) as send:
            assert send.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS) == 64
            assert send.getsockopt(socket.IPPROTO_IPV6, IPV6_MTU_DISCOVER) == 0
            assert send.getsockopt(socket.IPPROTO_IPV6, IPV6_AUTOFLOWLABEL) == 0
            assert send.getsockopt(socket.IPPROTO_UDP, UDP_NO_CHECK6_TX) == 0
    finally:
        underlay.close()


def test_both_families_share_a_port_and_a_second_daemon_is_refused(port: int) -> None:
    underlays = [Underlay.open("lo", LOOPBACK[version], port, 1) for version in (4, 6)]
    try:
        for version in (4, 6):
            with pytest.raises(Refusal, match=f"already serves UDP port {port}"):
                Underlay.open("lo", LOOPBACK[version], port, 1)
    finally:
        for underlay in underlays:
            underlay.close()


def test_who_holds_the_ipv6_port_is_named(port: int) -> None:
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as holder:
        holder.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        holder.bind(("", port))
        ipv4 = Underlay.open("lo", LOOPBACK[4], port, 1)
        with pytest.raises(Refusal, match=rf"UDP port {port} is held by .*pid "):
            Underlay.open("lo", LOOPBACK[6], port, 1)
        ipv4.close()


def test_ipv6_without_a_checksum_is_not_taken(port: int) -> None:
    underlay = Underlay.open("lo", LOOPBACK[6], port, 1)
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sender:
            sender.setsockopt(socket.IPPROTO_UDP, UDP_NO_CHECK6_TX, 1)
            sender.sendto(b"without", ("::1", port))
            sender.setsockopt(socket.IPPROTO_UDP, UDP_NO_CHECK6_TX, 0)
            sender.sendto(b"with", ("::1", port))
            with readable(underlay) as receive:
                assert receive.recv(16) == b"with"
    finally:
        underlay.close()
