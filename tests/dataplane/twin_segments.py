"""The naive twin of csrc/gso.c and csrc/gro.c, their oracle.

Coalescing is defined by segmentation: packets may be one super-packet if segmentation gives exactly
these packets back. What the fast path leaves alone although it could be joined is in `plain`.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from tests.dataplane.twin import checksum

TCP, UDP = 6, 17
WITH_PORTS = (TCP, UDP, 33, 132, 136)
FIN, SYN, RST, PSH, ACK, URG, ECE, CWR = (1 << bit for bit in range(8))
SEGMENTS_MAX = 64


@dataclass(frozen=True)
class Vnet:
    """struct virtio_net_hdr_mrg_rxbuf, as on a TUN."""

    flags: int = 0
    gso_type: int = 0
    header_length: int = 0
    gso_size: int = 0
    start: int = 0
    offset: int = 0

    def pack(self) -> bytes:
        """The 12 bytes."""
        return struct.pack("=BBHHHHH", *vars_of(self), 0)

    @classmethod
    def unpack(cls, octets: bytes) -> Vnet:
        """Read the 12 bytes."""
        return cls(*struct.unpack("=BBHHHH", octets[:10]))


def vars_of(vnet: Vnet) -> tuple[int, ...]:
    """Its fields in order."""
    return (
        vnet.flags, vnet.gso_type, vnet.header_length, vnet.gso_size, vnet.start, vnet.offset,
    )  # fmt: skip


def ip_length(packet: bytes) -> tuple[int, int, int] | None:
    """Length of packet and header, and protocol; None when it is not sound."""
    if len(packet) >= 40 and packet[0] >> 4 == 6:
        mapped = bytes(10) + b"\xff\xff"
        total = 40 + int.from_bytes(packet[4:6], "big")
        sound = total <= len(packet) and mapped not in (packet[8:20], packet[24:36])
        return (total, 40, packet[6]) if sound else None
    if len(packet) < 20 or packet[0] >> 4 != 4:
        return None
    header, total = (packet[0] & 15) * 4, int.from_bytes(packet[2:4], "big")
    if not 20 <= header <= total <= len(packet) or checksum(packet[:header]):
        return None
    return total, header, packet[9]


def is_fragment(packet: bytes) -> bool:
    """Whether it is an IPv4 fragment."""
    return packet[0] >> 4 == 4 and bool(int.from_bytes(packet[6:8], "big") & 0x3FFF)


def headers_of(packet: bytes) -> int:
    """Bytes in front of the payload of TCP or UDP, of the IP header in others and in fragments."""
    _, start, protocol = ip_length(packet) or (0, 0, 0)
    if is_fragment(packet) or protocol not in (TCP, UDP):
        return start
    return start + (8 if protocol == UDP else (packet[start + 12] >> 4) * 4)


def pseudo(packet: bytes, protocol: int, length: int) -> bytes:
    """The pseudo header of TCP and UDP."""
    addresses = packet[12:20] if packet[0] >> 4 == 4 else packet[8:40]
    return addresses + struct.pack("!HH", protocol, length)


def partial(packet: bytes, protocol: int, start: int) -> bytes:
    """The checksum field of a packet whose checksum is left to the hardware."""
    return (0xFFFF ^ checksum(pseudo(packet, protocol, len(packet) - start))).to_bytes(2, "big")


def with_ip_length(packet: bytes) -> bytes:
    """The packet with its length in the IP header, and the header's checksum."""
    if packet[0] >> 4 == 6:
        return packet[:4] + struct.pack("!H", len(packet) - 40) + packet[6:]
    header = (packet[0] & 15) * 4
    bare = packet[:2] + struct.pack("!H", len(packet)) + packet[4:10] + b"\0\0" + packet[12:]
    return bare[:10] + struct.pack("!H", checksum(bare[:header])) + bare[12:]


def complete(packet: bytes, protocol: int, start: int) -> bytes:
    """The packet with a whole TCP or UDP checksum."""
    at = start + (16 if protocol == TCP else 6)
    bare = packet[:at] + b"\0\0" + packet[at + 2 :]
    value = checksum(pseudo(bare, protocol, len(bare) - start) + bare[start:])
    if protocol == UDP and value == 0:
        value = 0xFFFF
    return bare[:at] + struct.pack("!H", value) + bare[at + 2 :]


def segment(vnet: Vnet, packet: bytes) -> list[bytes] | None:
    """Cut a super-packet, or complete a checksum; None when the headers disagree."""
    sound = ip_length(packet)
    if sound is None:
        return None
    total, header, protocol = sound
    packet = packet[:total]
    kind = vnet.gso_type & 0x7F
    if kind == 0:
        return _complete_any(vnet, packet, header)
    expected = UDP if kind == 5 else TCP
    allowed = {5, 1 if packet[0] >> 4 == 4 else 4}
    behind = packet[0] >> 4 == 6 and vnet.start >= header
    right = vnet.start == header if protocol == expected else behind
    if kind not in allowed or not vnet.flags & 1 or not right or vnet.start > 256:
        return None
    if expected == TCP:
        if vnet.start + 20 > min(total, 256) or packet[vnet.start + 12] >> 4 < 5:
            return None
        headers = vnet.start + (packet[vnet.start + 12] >> 4) * 4
    else:
        headers = vnet.start + 8
    if headers >= total or headers > 256 or vnet.gso_size == 0:
        return None
    payload = packet[headers:]
    pieces = [payload[at : at + vnet.gso_size] for at in range(0, len(payload), vnet.gso_size)]
    return [
        _segment(packet[:headers], expected, vnet.start, number, pieces)
        for number in range(len(pieces))
    ]


def _segment(
    headers: bytes, protocol: int, start: int, number: int, pieces: Sequence[bytes]
) -> bytes:
    made = bytearray(headers)
    if made[0] >> 4 == 4:
        made[4:6] = struct.pack("!H", int.from_bytes(made[4:6], "big") + number & 0xFFFF)
    if protocol == TCP:
        before = sum(map(len, pieces[:number]))
        sequence = int.from_bytes(made[start + 4 : start + 8], "big") + before & 0xFFFFFFFF
        made[start + 4 : start + 8] = struct.pack("!I", sequence)
        if number:
            made[start + 13] &= ~CWR & 0xFF
        if number + 1 < len(pieces):
            made[start + 13] &= ~(FIN | PSH) & 0xFF
    else:
        made[start + 4 : start + 6] = struct.pack("!H", 8 + len(pieces[number]))
    return complete(with_ip_length(bytes(made) + pieces[number]), protocol, start)


def _complete_any(vnet: Vnet, packet: bytes, header: int) -> list[bytes] | None:
    if not vnet.flags & 1:
        return [packet]
    at = vnet.start + vnet.offset
    if vnet.start < header or vnet.start > len(packet) or at + 2 > len(packet):
        return None
    value = checksum(packet[vnet.start :]) or 0xFFFF
    return [packet[:at] + struct.pack("!H", value) + packet[at + 2 :]]


def join(packets: Sequence[bytes]) -> tuple[Vnet, bytes]:
    """What the TUN is given for these packets of one flow; one packet is given as it is."""
    first = packets[0]
    if len(packets) == 1:
        return Vnet(), first
    _, start, protocol = ip_length(first) or (0, 0, 0)
    headers = start + ((first[start + 12] >> 4) * 4 if protocol == TCP else 8)
    made = bytearray(b"".join([first, *(packet[headers:] for packet in packets[1:])]))
    if protocol == TCP:
        for packet in packets:
            made[start + 13] |= packet[start + 13]
        gso_type, offset = (1 if made[0] >> 4 == 4 else 4), 16
    else:
        made[start + 4 : start + 6] = struct.pack("!H", len(made) - start)
        gso_type, offset = 5, 6
    whole = with_ip_length(bytes(made))
    at = start + offset
    whole = whole[:at] + partial(whole, protocol, start) + whole[at + 2 :]
    return Vnet(1, gso_type, headers, len(first) - headers, start, offset), whole


def plain(packet: bytes, *, tcp: bool, udp: bool) -> bool:
    """Whether the fast path would join it at all; the rest follows from segmentation."""
    total, start, protocol = ip_length(packet) or (0, 0, 0)
    if is_fragment(packet) or start not in (20, 40) or (packet[0] >> 4, start) == (4, 40):
        return False
    if protocol == TCP:
        if not tcp or total < start + 20 or not 20 <= (packet[start + 12] >> 4) * 4 < total - start:
            return False
        return packet[start + 13] & ~(ECE | PSH | FIN) == ACK
    return udp and protocol == UDP and total > start + 8


def flow_key(packet: bytes) -> tuple[bytes, ...] | None:
    """What a flow has in common; None for what may belong to any."""
    total, start, protocol = ip_length(packet) or (0, 0, 0)
    if is_fragment(packet) or (packet[0] >> 4 == 6 and protocol not in WITH_PORTS):
        return None
    addresses = packet[12:20] if packet[0] >> 4 == 4 else packet[8:40]
    ports = packet[start : start + 4] if total >= start + 4 else b""
    return addresses, bytes([protocol]), ports if protocol in WITH_PORTS else b""


def _rejoins(packets: Sequence[bytes]) -> bool:
    """Whether segmentation gives exactly these packets back, but for ids that mean nothing."""
    vnet, whole = join(packets)
    if len(whole) > 0xFFFF:
        return False
    again = segment(vnet, whole)
    if again is None:
        return False
    atomic = packets[0][0] >> 4 == 4 and packets[0][6] & 0x40
    if atomic and len({packet[4:6] for packet in packets}) == 1:
        again = [with_ip_length(x[:4] + packets[0][4:6] + x[6:]) for x in again]
    return again == list(packets)


def coalesce(packets: Sequence[bytes], *, tcp: bool, udp: bool) -> list[list[bytes]]:
    """Group packets as they are written, in the order of the first of each group."""
    groups: list[list[bytes]] = []
    newest: dict[tuple[bytes, ...], list[bytes]] = {}
    for given in packets:
        sound = ip_length(given)
        if sound is None:
            continue
        packet = given[: sound[0]]
        key = flow_key(packet)
        if key is None:
            newest.clear()
        group = newest.get(key) if key is not None else None
        if (
            group is not None
            and plain(packet, tcp=tcp, udp=udp)
            and plain(group[0], tcp=tcp, udp=udp)
            and len(group) < SEGMENTS_MAX
            and _rejoins([*group, packet])
        ):
            group.append(packet)
            continue
        groups.append([packet])
        if key is not None:
            newest[key] = groups[-1]
    return groups
