"""IPv6 inside over IPv6 outside: the C fast path against its naive twin and scapy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import IPv6Address, IPv6Network

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrFragment
from scapy.layers.l2 import Ether
from scapy.layers.vxlan import VXLAN

from pyflannel.dataplane.fastpath import (
    AntiSpoofing,
    Context,
    Dropped,
    Encapsulated,
    FastpathConfig,
)
from pyflannel.dataplane.route import MacAddress, Route, Vni
from tests.dataplane.twin import Twin

NETWORK = IPv6Network("2001:db8:42::/56")
OWN = MacAddress.parse("02:00:00:00:00:01")
PEER = Route(
    IPv6Network("2001:db8:42:2::/64"),
    MacAddress.parse("02:00:00:00:00:02"),
    IPv6Address("fd77::2"),
    previous_mac=MacAddress.parse("02:00:00:00:00:12"),
)
OTHER = Route(
    IPv6Network("2001:db8:42:3::/64"),
    MacAddress.parse("02:00:00:00:00:03"),
    IPv6Address("fd77::3"),
)
ROUTES = (PEER, OTHER)


@contextmanager
def context(
    mode: AntiSpoofing = AntiSpoofing.ENFORCE,
    routes: tuple[Route, ...] = ROUTES,
    mac: MacAddress = OWN,
    sources: tuple[tuple[IPv6Network, IPv6Network], ...] = (),
) -> Iterator[Context]:
    made = Context(
        FastpathConfig(
            Vni(1), mac, NETWORK, mode, peer_sources=sources, inner_ipv4=False, inner_ipv6=True
        )
    )
    for route in routes:
        made.replace(route)
    try:
        yield made
    finally:
        made.close()


def twin(mode: str = "enforce") -> Twin:
    return Twin(1, OWN, NETWORK, ROUTES, mode)


def inner(
    source: str = "2001:db8:42:2::7",
    destination: str = "2001:db8:42:1::9",
    length: int = 64,
    tc: int = 0,
) -> bytes:
    payload = bytes(i & 0xFF for i in range(length - 40))
    return bytes(IPv6(src=source, dst=destination, tc=tc, fl=0x12345, nh=253, hlim=17) / payload)


def datagram(
    packet: bytes,
    source: MacAddress = PEER.vtep_mac,
    destination: MacAddress = OWN,
    ethertype: int = 0x86DD,
) -> bytes:
    ethernet = Ether(src=str(source), dst=str(destination), type=ethertype)
    return bytes(VXLAN(vni=1)) + bytes(ethernet) + packet


def decapsulate(made: Context, octets: bytes, source: IPv6Address, tos: int) -> bytes | str:
    result = made.decapsulate(octets, source, tos)
    return result.reason if isinstance(result, Dropped) else result


CASES = {
    "short": datagram(inner())[:21],
    "vtep_mac": datagram(inner(), source=OTHER.vtep_mac),
    "not_our_mac": datagram(inner(), destination=PEER.vtep_mac),
    "ethertype": datagram(bytes(IP(src="10.5.2.7", dst="10.5.1.9")), ethertype=0x0800),
    "inner_malformed": datagram(inner())[:-1],
    "inner_source": datagram(inner(source="2001:db8:42:3::7")),
}
DATAGRAMS = [*CASES.values(), datagram(inner())]


@pytest.mark.parametrize("reason", CASES)
def test_each_reason_in_both(reason: str) -> None:
    peer = IPv6Address("fd77::2")
    with context() as made:
        assert decapsulate(made, CASES[reason], peer, 0) == reason
    assert twin().decapsulate(CASES[reason], peer, 0) == reason


@pytest.mark.parametrize(
    "source", ["2001:db8:42:1::3", "2001:db8:42:80::7", "::1", "::", "ff02::1"]
)
def test_a_peer_may_not_send_as_us_or_as_nobody(source: str) -> None:
    with context() as made:
        packet = datagram(inner(source=source))
        assert made.decapsulate(packet, PEER.underlay) == Dropped("inner_source")
        assert made.decapsulate(datagram(inner()), OTHER.underlay) == Dropped("vtep_mac")
        assert made.decapsulate(datagram(inner()), IPv6Address("fd77::9")) == Dropped(
            "unknown_vtep"
        )


def test_peer_source_lets_a_lease_send_from_another_address() -> None:
    nat = IPv6Network("2001:db8:77::/48")
    assert isinstance(PEER.subnet, IPv6Network)
    with context(sources=((nat, PEER.subnet),)) as made:
        assert made.decapsulate(datagram(inner()), nat[8]) == inner()


@pytest.mark.parametrize("inner_ecn", range(4))
@pytest.mark.parametrize("outer_ecn", range(4))
def test_ecn_through_the_tunnel(inner_ecn: int, outer_ecn: int) -> None:
    octets = datagram(inner(tc=0xB8 | inner_ecn))
    with context() as made:
        result = decapsulate(made, octets, IPv6Address("fd77::2"), outer_ecn)
    assert result == twin().decapsulate(octets, IPv6Address("fd77::2"), outer_ecn)
    if isinstance(result, bytes):
        read = IPv6(result)
        assert (read.tc >> 2, read.fl, read.hlim) == (0xB8 >> 2, 0x12345, 17)


@given(
    octets=st.one_of(
        st.binary(max_size=120),
        st.tuples(st.sampled_from(DATAGRAMS), st.integers(0, 70), st.binary(max_size=3)).map(
            lambda x: x[0][: x[1]] + x[2] + x[0][x[1] + len(x[2]) :]
        ),
    ),
    source=st.sampled_from(["fd77::2", "fd77::3", "fd77::9"]),
    tos=st.integers(0, 255),
    mode=st.sampled_from(["enforce", "off"]),
)
@settings(max_examples=1000)
def test_decapsulation_equals_the_twin(octets: bytes, source: str, tos: int, mode: str) -> None:
    with context(AntiSpoofing[mode.upper()]) as made:
        got = decapsulate(made, octets, IPv6Address(source), tos)
    assert got == twin(mode).decapsulate(octets, IPv6Address(source), tos)


@given(
    position=st.integers(0, 40),
    junk=st.binary(max_size=3),
    destination=st.sampled_from(
        ["2001:db8:42:2::1", "2001:db8:42:3::ff", "2001:db8:42:9::1", "ff02::2", "2001:db8::1"]
    ),
    length=st.integers(40, 1430),
    tc=st.integers(0, 255),
)
@settings(max_examples=1000)
def test_encapsulation_equals_the_twin(
    position: int, junk: bytes, destination: str, length: int, tc: int
) -> None:
    packet = inner("2001:db8:42:1::9", destination, length, tc)
    packet = packet[:position] + junk + packet[position + len(junk) :]
    expected = twin().encapsulate(packet)
    with context() as made:
        result = made.encapsulate(packet)
    if isinstance(result, Dropped):
        assert result.reason == expected
    else:
        total = 40 + int.from_bytes(packet[4:6], "big")
        assert (result.header + packet[:total], result.outer_tos) == expected


def test_ipv4_is_not_carried_by_the_ipv6_device() -> None:
    with context() as made:
        packet = bytes(IP(src="10.5.1.9", dst="10.5.2.7"))
        assert made.encapsulate(packet) == Dropped("encap_family")
        # What the kernel sends by itself on every device is told apart.
        packet = bytes(IP(src="10.5.1.9", dst="224.0.0.22"))
        assert made.encapsulate(packet) == Dropped("encap_multicast")


@pytest.mark.parametrize("length", [*range(40, 110), 1280, 1429, 1430])
def test_decap_of_encap_is_the_packet(length: int) -> None:
    packet = inner("2001:db8:42:1::9", "2001:db8:42:2::7", length)
    ours = Route(IPv6Network("2001:db8:42:1::/64"), OWN, IPv6Address("fd77::1"))
    with context() as here, context(routes=(ours,), mac=PEER.vtep_mac) as there:
        sent = here.encapsulate(packet)
        assert isinstance(sent, Encapsulated)
        assert sent.route == PEER
        frame = VXLAN(sent.header + packet)
        assert frame[Ether].type == 0x86DD
        assert frame[IPv6].dst == "2001:db8:42:2::7"
        padded = sent.header + packet + b"\0" * 6
        assert there.decapsulate(padded, ours.underlay) == packet


def test_the_flow_hash_follows_ports_but_not_for_fragments() -> None:
    def flow(made: Context, packet: IPv6) -> int:
        sent = made.encapsulate(bytes(packet))
        assert isinstance(sent, Encapsulated)
        return sent.flow

    with context() as made:
        addresses = {"src": "2001:db8:42:1::9", "dst": "2001:db8:42:2::7"}
        flows = {flow(made, IPv6(**addresses) / TCP(sport=1000 + i)) % 16 for i in range(200)}
        assert len(flows) == 16
        first = IPv6(**addresses) / IPv6ExtHdrFragment(m=1, id=7, nh=17) / bytes(range(64))
        last = IPv6(**addresses) / IPv6ExtHdrFragment(offset=8, id=7, nh=17) / bytes(64)
        assert flow(made, first) == flow(made, last)
