"""Segmentation and coalescing in C against the naive twin and scapy.

Partial checksums: the field holds the pseudo header's sum only, as a kernel peer on a virtual link
leaves it; such a packet passes with the mark that it had in the peer's kernel.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scapy.layers.inet import IP, in4_chksum
from scapy.layers.inet6 import IPv6, in6_chksum
from scapy.utils import checksum as scapy_checksum

from pyflannel.dataplane import fastpath
from pyflannel.dataplane.offload import EVERY_OFFLOAD, NO_OFFLOAD, Offload
from tests.dataplane import packets as make
from tests.dataplane import twin_segments as twin
from tests.dataplane.packets import Packet, body
from tests.dataplane.twin_segments import ACK, CWR, ECE, FIN, PSH, SYN, Vnet

REPEATABLE = settings(derandomize=True)

V4 = Packet()
V6 = Packet(source=bytes.fromhex("20010db8" + "00" * 12), destination=bytes(15) + b"\x09")
KINDS = {
    f"{family}-{name}": replace(base, protocol=protocol)
    for family, base in (("v4", V4), ("v6", V6))
    for name, protocol in (("tcp", twin.TCP), ("udp", twin.UDP))
}


def coalesce(
    packets: Sequence[bytes], offload: Offload = EVERY_OFFLOAD, hint: int = 0
) -> list[tuple[Vnet, bytes]]:
    return [(Vnet.unpack(v), packet) for v, packet in fastpath.coalesce(packets, offload, hint)]


def segment(vnet: Vnet, packet: bytes, gap: int = 0) -> list[bytes] | None:
    return fastpath.segment(vnet.pack(), packet, gap)


@given(packet=make.packets(2000), size=st.integers(1, 600), gap=st.sampled_from([0, 22]))
@example(packet=V4, size=1, gap=0)
@settings(REPEATABLE, max_examples=200)
def test_segments_equal_the_twins(packet: Packet, size: int, gap: int) -> None:
    vnet, whole = packet.super_packet(size)
    assert segment(vnet, whole, gap) == twin.segment(vnet, whole)


@given(
    packet=make.packets(300),
    start=st.integers(0, 300),
    vnet=st.builds(
        Vnet,
        st.integers(0, 3),
        st.sampled_from([0, 1, 3, 4, 5, 0x81, 0x84]),
        st.integers(0, 0xFFFF),
        st.integers(0, 400),
        st.sampled_from([0, 19, 20, 24, 40, 41, 60, 250]),
        st.sampled_from([0, 6, 16, 200, 0xFFFF]),
    ),
    cut=st.integers(0, 60),
)
@settings(REPEATABLE, max_examples=400)
def test_any_vnet_header_is_read_as_the_twin_reads_it(
    packet: Packet, start: int, vnet: Vnet, cut: int
) -> None:
    octets = packet.build()
    octets = octets[: len(octets) - cut] if start % 4 == 0 else octets
    assert segment(vnet, octets) == twin.segment(vnet, octets)


@pytest.mark.parametrize("kind", KINDS)
def test_every_length_is_cut_and_joined_again(kind: str) -> None:
    """Payloads of 1..1500 bytes in segments of 100 and of the longest, odd ones among them."""
    for length in range(1, 1501):
        packet = replace(KINDS[kind], payload=body(length), id=65530)
        vnet, whole = packet.super_packet(100)
        cut = segment(vnet, whole)
        assert cut is not None
        assert [len(x) - packet.headers() for x in cut[:-1]] == [100] * (len(cut) - 1)
        expected = [(vnet, whole)] if len(cut) > 1 else [(Vnet(), packet.build())]
        assert coalesce(cut) == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1024, 1379, 1448, 9000, 32768])
def test_64_kb_super_packets(kind: str, size: int) -> None:
    packet = KINDS[kind]
    longest = 65535 - packet.headers()
    for length in (longest, longest - 1, 64 * size, 63 * size + 1):
        packet = replace(packet, payload=body(min(length, longest)), flags=ACK | PSH)
        vnet, whole = packet.super_packet(size)
        cut = segment(vnet, whole, 22)
        assert cut == twin.segment(vnet, whole)
        assert cut is not None
        assert coalesce(cut) == [(vnet, whole)]


@given(packet=make.packets(3000), size=st.integers(60, 1448))
@settings(REPEATABLE, max_examples=150)
def test_coalesce_of_segment_is_the_packet(packet: Packet, size: int) -> None:
    """For what may be joined at all; of the rest, what the twin joins (all behind CWR, say)."""
    vnet, whole = packet.super_packet(size)
    cut = segment(vnet, whole)
    if cut is None:
        assert not packet.payload
        return
    if len(cut) > 1 and all(twin.plain(x, tcp=True, udp=True) for x in cut):
        assert coalesce(cut) == [(vnet, whole)]
    else:
        check_groups(cut, EVERY_OFFLOAD)


def check_groups(sent: list[bytes], offload: Offload) -> None:
    tcp, udp = Offload.TSO in offload, Offload.USO in offload
    got, groups = coalesce(sent, offload), twin.coalesce(sent, tcp=tcp, udp=udp)
    assert len(got) == len(groups)
    for (vnet, packet), group in zip(got, groups):
        if len(group) > 1:
            assert (vnet, packet) == twin.join(group)
        else:
            assert packet == group[0]
            assert vnet == Vnet() or (vnet.flags == 1 and is_partial(packet))


def is_partial(packet: bytes) -> bool:
    _, start, protocol = twin.ip_length(packet) or (0, 0, 0)
    at = start + (16 if protocol == twin.TCP else 6)
    whole = twin.complete(packet, protocol, start)
    return packet[at : at + 2] == twin.partial(packet, protocol, start) and packet != whole


@given(sent=make.streams(), offload=st.sampled_from([*Offload, NO_OFFLOAD, EVERY_OFFLOAD]))
@settings(REPEATABLE, max_examples=250)
def test_groups_equal_the_twins(sent: list[bytes], offload: Offload) -> None:
    """Nothing is reordered in a flow, duplicated, corrupted or joined that must not be."""
    check_groups(sent, offload)


@given(sent=make.streams(), seed=st.integers(0, 1000))
@settings(REPEATABLE, max_examples=100)
def test_groups_of_reordered_packets_equal_the_twins(sent: list[bytes], seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(3):
        i, j = rng.randrange(len(sent)), rng.randrange(len(sent))
        sent[i], sent[j] = sent[j], sent[i]
    check_groups([*sent, *sent[:5]], EVERY_OFFLOAD)


def flow_of(base: Packet, count: int, size: int = 100) -> list[Packet]:
    return [replace(base, payload=body(size, i), id=i, sequence=i * size) for i in range(count)]


@pytest.mark.parametrize("kind", KINDS)
def test_more_packets_than_are_held(kind: str) -> None:
    """Room ends at 256 packets and at 1024 segments; order and bytes stay."""
    flow = [x.build() for x in flow_of(KINDS[kind], 3000, 20)]
    again: list[bytes] = []
    for vnet, packet in coalesce(flow):
        again += twin.segment(vnet, packet) or []
    assert again == flow
    alone = [x.build() for x in flow_of(KINDS[kind], 600, 0)]
    assert coalesce(alone) == [(Vnet(), x) for x in alone]


def test_padding_behind_a_udp_datagram_is_not_overtaken() -> None:
    a, padded, b = flow_of(replace(V4, protocol=twin.UDP), 3)
    octets = padded.build()
    octets = octets[:24] + (8 + 90).to_bytes(2, "big") + octets[26:]
    sent = [a.build(), octets, b.build()]
    assert coalesce(sent) == [(Vnet(), x) for x in sent]


def test_ids_of_packets_with_df_count_up_or_stay() -> None:
    flow = flow_of(V4, 3)
    assert len(coalesce([x.build() for x in flow])) == 1
    assert len(coalesce([replace(x, id=9).build() for x in flow])) == 1
    mixed = [replace(x, id=number) for x, number in zip(flow, (9, 9, 11))]
    assert len(coalesce([x.build() for x in mixed])) == 2
    fragmentable = [replace(x, id=9, fragment=0).build() for x in flow]
    assert len(coalesce(fragmentable)) == 3


@pytest.mark.parametrize("flags", [ACK | CWR, ACK | SYN, ACK | ECE | CWR, ACK | PSH | CWR])
def test_flags_that_only_one_segment_may_have_are_never_joined(flags: int) -> None:
    sent = [replace(x, flags=flags).build() for x in flow_of(V4, 3)]
    assert coalesce(sent) == [(Vnet(), x) for x in sent]


@pytest.mark.parametrize("kind", KINDS)
def test_partial_checksum_of_a_kernel_peer_keeps_its_mark(kind: str) -> None:
    base = KINDS[kind]
    vnet, whole = replace(base, payload=body(1000)).super_packet(1000)
    ((got, packet),) = coalesce([whole])
    assert packet == whole
    assert got == Vnet(1, 0, 0, 0, vnet.start, vnet.offset)


@pytest.mark.parametrize("kind", KINDS)
def test_super_packet_of_a_kernel_peer_keeps_its_segments(kind: str) -> None:
    flags = ACK | CWR | FIN
    vnet, whole = replace(KINDS[kind], payload=body(60_000), flags=flags).super_packet(1300)
    assert coalesce([whole], hint=1300) == [(vnet, whole)]


def test_without_a_hint_a_stream_is_cut_and_a_datagram_is_not() -> None:
    _, stream = replace(V4, payload=body(8000)).super_packet(1300)
    ((vnet, packet),) = coalesce([stream])
    assert (vnet.gso_type, packet) == (1, stream)
    assert 0 < vnet.gso_size < 1400
    _, datagram = replace(V4, protocol=twin.UDP, payload=body(8000)).super_packet(8000)
    assert coalesce([datagram]) == [(Vnet(1, 0, 0, 0, 20, 6), datagram)]


def test_a_mapped_address_in_an_ipv6_packet_is_malformed() -> None:
    mapped = bytes(10) + b"\xff\xff\x0a\x05\x02\x07"
    for changed in (replace(V6, source=mapped), replace(V6, destination=mapped)):
        assert coalesce([changed.build()]) == []


@given(packet=make.packets(1500), size=st.integers(100, 1448))
@settings(REPEATABLE, max_examples=60)
def test_scapy_finds_every_checksum_and_length_right(packet: Packet, size: int) -> None:
    start, protocol = packet.transport_start(), packet.protocol
    vnet, whole = packet.super_packet(size)
    for octets in segment(vnet, whole) or []:
        if octets[0] >> 4 == 6:
            assert in6_chksum(protocol, IPv6(octets), octets[start:]) == 0
            assert IPv6(octets).plen == len(octets) - 40
        else:
            assert in4_chksum(protocol, IP(octets), octets[start:]) == 0
            assert scapy_checksum(octets[:start]) == 0
            assert IP(octets).len == len(octets)
