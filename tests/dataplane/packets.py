"""Inner packets for tests, built by hand so that each field can be right or wrong."""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace

from hypothesis import strategies as st

from tests.dataplane import twin_segments as twin
from tests.dataplane.twin_segments import ACK, CWR, ECE, FIN, PSH, TCP, UDP, URG, Vnet

DONT_FRAGMENT = 0x4000
MORE_FRAGMENTS = 0x2000


@dataclass(frozen=True)
class Packet:
    """What a packet says; `build` makes it, with right checksums."""

    source: bytes = b"\x0a\x05\x02\x07"
    destination: bytes = b"\x0a\x05\x01\x09"
    protocol: int = TCP
    ports: tuple[int, int] = (1000, 2000)
    payload: bytes = b""
    tos: int = 0
    ttl: int = 63
    id: int = 0
    fragment: int = DONT_FRAGMENT
    ip_options: bytes = b""
    sequence: int = 0
    acknowledgement: int = 1
    flags: int = ACK
    window: int = 512
    urgent: int = 0
    tcp_options: bytes = b""

    def transport_start(self) -> int:
        """Where the transport header begins."""
        return 40 if len(self.source) == 16 else 20 + len(self.ip_options)

    def headers(self) -> int:
        """Bytes in front of the payload."""
        return self.transport_start() + (20 + len(self.tcp_options) if self.protocol == TCP else 8)

    def build(self) -> bytes:
        """The packet."""
        return twin.complete(self._bare(), self.protocol, self.transport_start())

    def super_packet(self, size: int) -> tuple[Vnet, bytes]:
        """The packet as a TUN hands it over when its payload is cut every `size` bytes."""
        packet, start = self._bare(), self.transport_start()
        offset = 16 if self.protocol == TCP else 6
        at = start + offset
        left = twin.partial(packet, self.protocol, start)
        kind = 5 if self.protocol == UDP else 4 if len(self.source) == 16 else 1
        if self.flags & CWR and self.protocol == TCP:
            kind |= 0x80
        vnet = Vnet(1, kind, self.headers(), size, start, offset)
        return vnet, packet[:at] + left + packet[at + 2 :]

    def _bare(self) -> bytes:
        if self.protocol == TCP:
            transport = struct.pack(
                "!HHIIBBHHH", *self.ports, self.sequence, self.acknowledgement,
                (20 + len(self.tcp_options)) // 4 << 4, self.flags, self.window, 0, self.urgent,
            ) + self.tcp_options  # fmt: skip
        else:
            transport = struct.pack("!HHHH", *self.ports, 8 + len(self.payload), 0)
        if len(self.source) == 16:
            word = 6 << 28 | self.tos << 20 | (self.id & 0xFFF)
            ip = struct.pack("!IHBB", word, 0, self.protocol, self.ttl)
            ip += self.source + self.destination
        else:
            ip = struct.pack(
                "!BBHHHBBH", 0x45 + len(self.ip_options) // 4, self.tos, 0, self.id,
                self.fragment, self.ttl, self.protocol, 0,
            ) + self.source + self.destination + self.ip_options  # fmt: skip
        return twin.with_ip_length(ip + transport + self.payload)


def body(length: int, seed: int = 0) -> bytes:
    """Payload in which no two places look alike."""
    return bytes((seed + 7 * at + (at >> 8)) & 0xFF for at in range(length))


def options(words: int) -> st.SearchStrategy[bytes]:
    """Options of up to so many 32-bit words; a time stamp is often among them."""
    stamp = st.binary(min_size=8, max_size=8).map(lambda x: b"\x01\x01\x08\x0a" + x)
    chosen = st.integers(0, words).flatmap(lambda n: st.binary(min_size=4 * n, max_size=4 * n))
    return st.one_of(st.just(b""), stamp, chosen)


ADDRESSES = st.sampled_from(
    [
        (b"\x0a\x05\x02\x07", b"\x0a\x05\x01\x09"),
        (
            bytes.fromhex("20010db8" + "00" * 11 + "01"),
            bytes.fromhex("20010db8" + "00" * 11 + "02"),
        ),
    ]
)
FLAGS = st.sampled_from([ACK, ACK, ACK | PSH, ACK | FIN, ACK | ECE, ACK | CWR, ACK | URG])


@st.composite
def packets(draw: st.DrawFn, longest: int = 200) -> Packet:
    """Any packet of TCP or UDP."""
    source, destination = draw(ADDRESSES)
    return Packet(
        source=source,
        destination=destination,
        protocol=draw(st.sampled_from([TCP, UDP])),
        ports=(draw(st.integers(0, 3)), draw(st.integers(0, 0xFFFF))),
        payload=body(draw(st.integers(0, longest)), draw(st.integers(0, 255))),
        tos=draw(st.integers(0, 255)),
        ttl=draw(st.integers(1, 255)),
        id=draw(st.integers(0, 0xFFFF)),
        fragment=draw(st.sampled_from([0, DONT_FRAGMENT])),
        ip_options=b"" if len(source) == 16 else draw(options(10)),
        sequence=draw(st.one_of(st.integers(0, 0xFFFFFFFF), st.just(0xFFFFFFF0))),
        acknowledgement=draw(st.integers(0, 0xFFFFFFFF)),
        flags=draw(st.integers(0, 255)),
        window=draw(st.integers(0, 0xFFFF)),
        urgent=draw(st.integers(0, 0xFFFF)),
        tcp_options=draw(options(10)),
    )


@st.composite
def streams(draw: st.DrawFn) -> list[bytes]:
    """Packets of a few flows, most of them in sequence, with everything that can be wrong."""
    source, destination = draw(ADDRESSES)
    flows = [
        Packet(
            source=source,
            destination=destination,
            protocol=draw(st.sampled_from([TCP, TCP, UDP])),
            ports=(port, 80),
            fragment=draw(st.sampled_from([0, DONT_FRAGMENT])),
            id=draw(st.integers(0, 0xFFFF)),
            sequence=draw(st.sampled_from([0, 0xFFFFFF80])),
            tcp_options=draw(options(3)),
        )
        for port in range(draw(st.integers(1, 3)))
    ]
    size, made = draw(st.sampled_from([1, 7, 32])), []
    for turn in range(draw(st.integers(1, 40))):
        index = draw(st.integers(0, len(flows) - 1))
        flow = flows[index]
        length = draw(st.sampled_from([size] * 6 + [size - 1, size + 1, 0]))
        packet = replace(flow, payload=body(length, turn))
        change = draw(st.sampled_from([*CHANGES, *[""] * 20]))
        if change:
            packet = _changed(packet, change, draw(st.integers(0, 0xFFFF)))
        made.append(_broken(packet.build(), packet, change))
        step = draw(st.sampled_from([1, 1, 1, 1, 1, 0, 2]))
        flows[index] = replace(
            flow,
            id=flow.id + step & 0xFFFF,
            sequence=flow.sequence + length & 0xFFFFFFFF,
        )
    return made


CHANGES = (
    "flags", "window", "acknowledgement", "urgent", "tos", "ttl", "options", "ip options",
    "fragment", "protocol", "bad checksum", "no checksum", "partial", "padding", "udp length",
    "retransmission", "tail cut",
)  # fmt: skip


def _changed(packet: Packet, change: str, value: int) -> Packet:
    flags = (ACK | PSH, ACK | FIN, ACK | ECE, ACK | CWR, ACK | URG, PSH, 2, 4, ACK | CWR | ECE)
    v4 = len(packet.source) == 4
    changes = {
        "flags": replace(packet, flags=flags[value % len(flags)]),
        "window": replace(packet, window=value),
        "acknowledgement": replace(packet, acknowledgement=value),
        "urgent": replace(packet, urgent=value),
        "tos": replace(packet, tos=value & 255),
        "ttl": replace(packet, ttl=value & 255),
        "options": replace(packet, tcp_options=bytes(4 * (value % 11))),
        "ip options": replace(packet, ip_options=b"\x01" * (4 * (value % 11)) if v4 else b""),
        "fragment": replace(packet, fragment=value & 0x3FFF),
        "retransmission": replace(packet, sequence=packet.sequence + value & 0xFFFFFFFF),
    }
    return changes.get(change, packet)


def _broken(octets: bytes, packet: Packet, change: str) -> bytes:
    start = packet.transport_start()
    at = start + (16 if packet.protocol == TCP else 6)
    if change == "bad checksum":
        return octets[:at] + bytes([octets[at] ^ 0x55]) + octets[at + 1 :]
    if change == "no checksum":
        return octets[:at] + b"\0\0" + octets[at + 2 :]
    if change == "partial":
        return octets[:at] + twin.partial(octets, packet.protocol, start) + octets[at + 2 :]
    if change == "padding":
        return octets + b"\xee" * 5
    if change == "udp length" and packet.protocol == UDP and packet.payload:
        return (
            octets[: start + 4] + struct.pack("!H", 7 + len(packet.payload)) + octets[start + 6 :]
        )
    if change == "protocol":
        other = bytes([packet.payload[0] if packet.payload else 1])
        position = 9 if len(packet.source) == 4 else 6
        return twin.with_ip_length(octets[:position] + other + octets[position + 1 :])
    if change == "tail cut":
        return octets[:-1]
    return octets
