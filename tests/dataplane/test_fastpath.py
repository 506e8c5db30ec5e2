"""The C fast path against its naive twin, scapy and packets that a kernel vxlan device sent."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import IPv4Address, IPv4Network, IPv6Network
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.l2 import Ether
from scapy.layers.vxlan import VXLAN
from scapy.packet import raw
from scapy.utils import rdpcap

from pyflannel.dataplane.fastpath import (
    DROP_REASONS,
    AntiSpoofing,
    Context,
    Dropped,
    Encapsulated,
    FastpathConfig,
)
from pyflannel.dataplane.route import IPNetwork, MacAddress, Route, Vni
from tests.dataplane.twin import Twin, checksum

NETWORK = IPv4Network("10.5.0.0/16")
OWN = MacAddress.parse("02:00:00:00:00:01")
PEER = Route(
    IPv4Network("10.5.2.0/24"),
    MacAddress.parse("02:00:00:00:00:02"),
    IPv4Address("192.0.2.2"),
    previous_mac=MacAddress.parse("02:00:00:00:00:12"),
)
NEIGHBOUR = Route(
    IPv4Network("10.5.3.0/24"), MacAddress.parse("02:00:00:00:00:03"), IPv4Address("192.0.2.3")
)
SHARING = Route(
    IPv4Network("10.5.4.0/24"), MacAddress.parse("02:00:00:00:00:04"), IPv4Address("192.0.2.3")
)
ROUTES = (PEER, NEIGHBOUR, SHARING)


@contextmanager
def context(
    mode: AntiSpoofing = AntiSpoofing.ENFORCE,
    routes: tuple[Route, ...] = ROUTES,
    mac: MacAddress = OWN,
    ignore: bool = False,
    sources: tuple[tuple[IPNetwork, IPNetwork], ...] = (),
    vni: int = 1,
) -> Iterator[Context]:
    made = Context(
        FastpathConfig(
            Vni(vni), mac, NETWORK, mode, ignore_reserved_bits=ignore, peer_sources=sources
        )
    )
    for route in routes:
        made.replace(route)
    try:
        yield made
    finally:
        made.close()


def twin(mode: str = "enforce", ignore: bool = False) -> Twin:
    return Twin(1, OWN, NETWORK, ROUTES, mode, ignore)


def inner(
    source: str = "10.5.2.7", destination: str = "10.5.1.9", length: int = 64, tos: int = 0
) -> bytes:
    payload = bytes(i & 0xFF for i in range(length - 20))
    return bytes(IP(src=source, dst=destination, tos=tos, proto=253, ttl=17) / payload)


def datagram(
    packet: bytes,
    source: MacAddress = PEER.vtep_mac,
    destination: MacAddress = OWN,
    vni: int = 1,
    ethertype: int = 0x0800,
) -> bytes:
    ethernet = Ether(src=str(source), dst=str(destination), type=ethertype)
    # Apart: scapy would add the next-protocol bit of VXLAN-GPE.
    return bytes(VXLAN(vni=vni)) + bytes(ethernet) + packet


def decapsulate(made: Context, octets: bytes, source: IPv4Address, tos: int) -> bytes | str:
    result = made.decapsulate(octets, source, tos)
    return result.reason if isinstance(result, Dropped) else result


GOOD = datagram(inner())
CASES = {
    "short": GOOD[:21],
    "no_vni_flag": b"\0" + GOOD[1:],
    "reserved_bits": b"\x88" + GOOD[1:],
    "wrong_vni": datagram(inner(), vni=2),
    "vtep_mac": datagram(inner(), source=NEIGHBOUR.vtep_mac),
    "not_our_mac": datagram(inner(), destination=PEER.vtep_mac),
    "ethertype": datagram(inner(), ethertype=0x86DD),
    "inner_malformed": datagram(inner())[:-1],
    "inner_source": datagram(inner(source="10.5.3.7")),
}
DATAGRAMS = [*CASES.values(), GOOD]


@pytest.mark.parametrize("reason", CASES)
def test_each_reason_in_both(reason: str) -> None:
    with context() as made:
        assert decapsulate(made, CASES[reason], IPv4Address("192.0.2.2"), 0) == reason
    assert twin().decapsulate(CASES[reason], IPv4Address("192.0.2.2"), 0) == reason


def test_unknown_vtep_loop_and_ecn() -> None:
    peer = IPv4Address("192.0.2.2")
    with context() as made:
        assert decapsulate(made, GOOD, IPv4Address("192.0.2.9"), 0) == "unknown_vtep"
        assert decapsulate(made, GOOD, peer, 3) == "ecn"
    with context(AntiSpoofing.OFF) as made:
        assert decapsulate(made, datagram(inner(), source=OWN), peer, 0) == "loop"


def test_reasons_have_distinct_names() -> None:
    assert len(set(DROP_REASONS)) == len(DROP_REASONS)


@pytest.mark.parametrize(
    "own_source", ["10.5.1.3", "10.5.200.7", "127.0.0.1", "224.0.0.1", "0.0.0.0"]
)
def test_a_peer_may_not_send_as_us_or_as_nobody(own_source: str) -> None:
    with context() as made:
        packet = datagram(inner(source=own_source))
        assert decapsulate(made, packet, IPv4Address("192.0.2.2"), 0) == "inner_source"


def test_source_outside_the_network_and_previous_mac_are_accepted() -> None:
    packet = inner(source="198.51.100.7")
    with context() as made:
        assert made.decapsulate(datagram(packet), PEER.underlay) == packet
        assert PEER.previous_mac is not None
        old = datagram(inner(), source=PEER.previous_mac)
        assert made.decapsulate(old, PEER.underlay) == inner()


def test_leases_behind_one_address_are_told_apart_by_mac() -> None:
    with context() as made:
        for route in (NEIGHBOUR, SHARING):
            packet = inner(source=str(route.subnet[5]))
            assert made.decapsulate(datagram(packet, route.vtep_mac), route.underlay) == packet
        crossed = datagram(inner(source=str(SHARING.subnet[5])), NEIGHBOUR.vtep_mac)
        assert made.decapsulate(crossed, NEIGHBOUR.underlay) == Dropped("inner_source")


def test_peer_source_lets_a_lease_send_from_another_address() -> None:
    nat = IPv4Network("203.0.113.0/24")
    with context(sources=((nat, PEER.subnet),)) as made:
        assert made.decapsulate(GOOD, nat[8]) == inner()
        assert made.decapsulate(datagram(inner(), NEIGHBOUR.vtep_mac), nat[8]) == Dropped(
            "vtep_mac"
        )


def test_modes_log_and_off_pass_what_enforce_drops() -> None:
    spoofed = datagram(inner(source="10.5.3.7"))
    for mode in (AntiSpoofing.LOG, AntiSpoofing.OFF):
        with context(mode) as made:
            assert made.decapsulate(spoofed, IPv4Address("192.0.2.77")) == inner(source="10.5.3.7")


def test_reserved_bits_can_be_ignored() -> None:
    with context(ignore=True) as made:
        assert (
            made.decapsulate(b"\xff\x01\x02\x03" + GOOD[4:7] + b"\x09" + GOOD[8:], PEER.underlay)
            == inner()
        )


@pytest.mark.parametrize("inner_ecn", range(4))
@pytest.mark.parametrize("outer_ecn", range(4))
def test_ecn_through_the_tunnel(inner_ecn: int, outer_ecn: int) -> None:
    packet = inner(tos=0xB8 | inner_ecn)
    with context() as made:
        result = decapsulate(made, datagram(packet), IPv4Address("192.0.2.2"), outer_ecn)
    assert result == twin().decapsulate(datagram(packet), IPv4Address("192.0.2.2"), outer_ecn)
    if isinstance(result, bytes):
        assert checksum(result[:20]) == 0
        assert result[8] == 17


@given(
    octets=st.one_of(
        st.binary(max_size=120),
        st.tuples(st.sampled_from(DATAGRAMS), st.integers(0, 60), st.binary(max_size=3)).map(
            lambda x: x[0][: x[1]] + x[2] + x[0][x[1] + len(x[2]) :]
        ),
    ),
    source=st.sampled_from(["192.0.2.2", "192.0.2.3", "192.0.2.9"]),
    tos=st.integers(0, 255),
    mode=st.sampled_from(["enforce", "off"]),
    ignore=st.booleans(),
)
@settings(max_examples=1500)
def test_decapsulation_equals_the_twin(
    octets: bytes, source: str, tos: int, mode: str, ignore: bool
) -> None:
    with context(AntiSpoofing[mode.upper()], ignore=ignore) as made:
        got = decapsulate(made, octets, IPv4Address(source), tos)
    assert got == twin(mode, ignore).decapsulate(octets, IPv4Address(source), tos)


@given(
    position=st.integers(0, 40),
    junk=st.binary(max_size=3),
    destination=st.sampled_from(["10.5.2.1", "10.5.3.255", "10.5.9.1", "224.0.0.9", "8.8.8.8"]),
    length=st.integers(20, 1450),
    tos=st.integers(0, 255),
)
@settings(max_examples=1000)
def test_encapsulation_equals_the_twin(
    position: int, junk: bytes, destination: str, length: int, tos: int
) -> None:
    packet = inner("10.5.1.9", destination, length, tos)
    packet = packet[:position] + junk + packet[position + len(junk) :]
    expected = twin().encapsulate(packet)
    with context() as made:
        result = made.encapsulate(packet)
    if isinstance(result, Dropped):
        assert result.reason == expected
    else:
        total = int.from_bytes(packet[2:4], "big")
        assert (result.header + packet[:total], result.outer_tos) == expected


@pytest.mark.parametrize("length", [*range(20, 90), 575, 576, 1449, 1450, 65535])
def test_decap_of_encap_is_the_packet(length: int) -> None:
    packet = inner("10.5.1.9", "10.5.2.7", length)
    ours = Route(IPv4Network("10.5.1.0/24"), OWN, IPv4Address("192.0.2.1"))
    with context() as here, context(routes=(ours,), mac=PEER.vtep_mac) as there:
        sent = here.encapsulate(packet)
        assert isinstance(sent, Encapsulated)
        assert sent.route == PEER
        padded = sent.header + packet + b"\0" * 6
        assert there.decapsulate(padded, ours.underlay) == packet


def test_scapy_reads_what_we_push() -> None:
    with context(vni=4097) as made:
        sent = made.encapsulate(inner("10.5.1.9", "10.5.2.7"))
    assert isinstance(sent, Encapsulated)
    frame = VXLAN(sent.header + inner("10.5.1.9", "10.5.2.7"))
    assert (frame.vni, frame.flags) == (4097, 8)
    assert (frame[Ether].src, frame[Ether].dst) == (str(OWN), str(PEER.vtep_mac))
    assert frame[IP].dst == "10.5.2.7"


def test_the_flow_hash_follows_ports_but_not_for_fragments() -> None:
    def flow(made: Context, packet: IP) -> int:
        sent = made.encapsulate(raw(packet))
        assert isinstance(sent, Encapsulated)
        return sent.flow

    with context() as made:
        addresses = {"src": "10.5.1.9", "dst": "10.5.2.7"}
        flows = {flow(made, IP(**addresses) / TCP(sport=1000 + i)) % 16 for i in range(200)}
        assert len(flows) == 16
        first = IP(**addresses, flags="MF", id=7) / UDP(sport=1, dport=2) / bytes(64)
        last = IP(**addresses, frag=9, id=7, proto=17) / bytes(64)
        assert flow(made, first) == flow(made, last)


def test_a_closed_context_refuses() -> None:
    with context() as made:
        pass
    for use in (made.counters, made.peers, made.take_suspects, lambda: made.replace(PEER)):
        with pytest.raises(TypeError):
            use()


def test_packets_of_a_kernel_vxlan_device() -> None:
    """Decision: a packet of ours equals the kernel's except MACs, source port, IP id, checksum."""
    seen = 0
    for frame in rdpcap(str(Path(__file__).parent / "data" / "kernel-vxlan-ping.pcap")):
        if UDP not in frame or frame[UDP].dport != 8472:
            continue
        seen += 1
        payload = raw(frame[UDP].payload)
        to, sender = MacAddress(payload[8:14]), MacAddress(payload[14:20])
        packet = payload[22:]
        network = IPv4Network("10.244.0.0/16")
        source = IPv4Network((IPv4Address(packet[12:16]), 24), strict=False)
        destination = IPv4Network((IPv4Address(packet[16:20]), 24), strict=False)
        receiver = Context(FastpathConfig(Vni(1), to, network))
        transmitter = Context(FastpathConfig(Vni(1), sender, network))
        try:
            receiver.replace(Route(source, sender, IPv4Address(frame[IP].src)))
            transmitter.replace(Route(destination, to, IPv4Address(frame[IP].dst)))
            assert receiver.decapsulate(payload, IPv4Address(frame[IP].src)) == packet
            sent = transmitter.encapsulate(packet)
            assert isinstance(sent, Encapsulated)
            assert sent.header + packet == payload
            assert (frame[IP].ttl, frame[IP].tos, int(frame[IP].flags)) == (64, sent.outer_tos, 0)
        finally:
            receiver.close()
            transmitter.close()
    assert seen > 0


def _random_route(rng: random.Random) -> Route:
    if rng.random() < 0.2:
        subnet: IPNetwork = IPv6Network((rng.getrandbits(128), rng.choice([1, 48, 64, 127])), False)
    else:
        address = 0x0A000000 | rng.getrandbits(12) << 8
        subnet = IPv4Network((address, rng.choice([20, 24, 24, 24, 26, 32])), strict=False)
    previous = MacAddress.random(rng.randbytes) if rng.random() < 0.3 else None
    mac, underlay = MacAddress.random(rng.randbytes), IPv4Address(0xC0000200 + rng.randrange(9))
    return Route(subnet, mac, underlay, previous_mac=previous)


def test_fib_equals_a_linear_scan() -> None:
    rng = random.Random(7)
    known: dict[IPNetwork, Route] = {}
    with context(routes=()) as made:
        for _ in range(12_000):
            route = _random_route(rng)
            if rng.random() < 0.6:
                made.replace(route)
                known[route.subnet] = route
            else:
                assert made.delete(route.subnet) == (known.pop(route.subnet, None) is not None)
            assert len(made) == len(known)
            if rng.random() < 0.05:
                target = rng.choice([*known, route.subnet])
                address = target[rng.randrange(min(target.num_addresses, 256))]
                hits = [x for x in known.values() if address in x.subnet]
                best = max(hits, key=lambda x: x.subnet.prefixlen, default=None)
                assert made.lookup(address) == best
        assert {peer.subnet for peer in made.peers()} == set(known)


def test_fib_changes_while_packets_are_looked_up() -> None:
    first = PEER
    second = Route(PEER.subnet, NEIGHBOUR.vtep_mac, NEIGHBOUR.underlay)
    packet = inner("10.5.1.9", "10.5.2.7")
    stop = threading.Event()
    with context(routes=(first,)) as made:

        def change() -> None:
            rng = random.Random(3)
            while not stop.is_set():
                made.replace(rng.choice((first, second)))
                other = _random_route(rng)
                made.replace(other)
                made.delete(other.subnet)

        writer = threading.Thread(target=change)
        writer.start()
        try:
            for _ in range(20_000):
                sent = made.encapsulate(packet)
                assert isinstance(sent, Encapsulated)
                assert sent.route in (first, second)
        finally:
            stop.set()
            writer.join()
