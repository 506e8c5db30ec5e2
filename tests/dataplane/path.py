"""Two nodes' data planes on real TUNs, sockets and a wire, and packets to send through them."""

from __future__ import annotations

import ctypes
import os
import random
import select
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Network

from pyflannel.dataplane.fastpath import AntiSpoofing, Context, FastpathConfig, Worker, WorkerIo
from pyflannel.dataplane.forwarder import THREADS, Workers
from pyflannel.dataplane.offload import Offload
from pyflannel.dataplane.route import IPNetwork, MacAddress, Route, Vni
from pyflannel.dataplane.tun import Tun
from pyflannel.dataplane.underlay import Underlay
from tests.dataplane import twin_segments as twin
from tests.dataplane.packets import DONT_FRAGMENT, MORE_FRAGMENTS, Packet, body
from tests.dataplane.twin_segments import ACK, CWR, ECE, FIN, PSH, SYN, TCP, UDP, URG, Vnet
from tests.lab.hosts import UNDERLAYS, Host, Lab, Namespace
from tests.lab.require import require_program, require_root

MTU = 1450
PORT = 8472
NETWORKS: dict[int, IPNetwork] = {4: IPv4Network("10.5.0.0/16"), 6: IPv6Network("2001:db8::/32")}
SUBNETS: dict[int, tuple[IPNetwork, IPNetwork]] = {
    4: (IPv4Network("10.5.1.0/24"), IPv4Network("10.5.2.0/24")),
    6: (IPv6Network("2001:db8:1::/64"), IPv6Network("2001:db8:2::/64")),
}
MACS = tuple(MacAddress.parse(f"02:00:00:00:00:0{number}") for number in (1, 2))
TOGETHER = 12
"""Packets put in before those before them must have come out: a veth drops what it cannot queue."""

ECN_NOT_ECT, ECN_CE = 0, 3

# linux/if_packet.h, linux/if_ether.h, linux/sched.h
SOL_PACKET, PACKET_VNET_HDR, PACKET_OUTGOING = 263, 15, 4
ETH_P_ALL, SO_RCVBUFFORCE, CLONE_NEWNET = 3, 33, 0x40000000


@contextmanager
def inside(namespace: Namespace) -> Iterator[None]:
    """Be in a network namespace; what is opened there stays in it."""
    libc = ctypes.CDLL(None, use_errno=True)
    here = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    there = os.open(f"/run/netns/{namespace.name}", os.O_RDONLY)
    try:
        assert libc.setns(there, CLONE_NEWNET) == 0
        yield
    finally:
        assert libc.setns(here, CLONE_NEWNET) == 0
        os.close(here)
        os.close(there)


@dataclass(frozen=True)
class Input:
    """A packet as the kernel hands it to a TUN, and the packets on the wire that it stands for."""

    vnet: Vnet
    packet: bytes

    def segments(self) -> list[bytes]:
        """What must arrive."""
        if self.vnet == Vnet():
            return [self.packet]
        made = twin.segment(self.vnet, self.packet)
        assert made
        return made


def flow_of(packet: bytes) -> tuple[bytes, ...]:
    """What packets that keep their order have in common."""
    protocol = packet[9:10] if packet[0] >> 4 == 4 else packet[6:7]
    return twin.flow_key(packet) or (b"fragments of any flow", protocol)


@lru_cache
def expected_of(family: int) -> tuple[list[bytes], ...]:
    """What must arrive for each input."""
    return tuple(one.segments() for one in inputs(family))


@lru_cache
def inputs(family: int) -> tuple[Input, ...]:
    """A mix of flows, sizes, flags, options, fragments and checksums; always the same."""
    rng = random.Random(11)
    source, destination = (subnet[7].packed for subnet in SUBNETS[family])
    flows = [
        Packet(
            source=source,
            destination=destination,
            protocol=UDP if number % 3 == 0 else TCP,
            ports=(1000 + number, 80),
            id=rng.randrange(1 << 16),
            fragment=rng.choice([0, DONT_FRAGMENT]),
            tcp_options=rng.choice([b"", b"\x01\x01\x08\x0a" + rng.randbytes(8)]),
            sequence=rng.choice([0, 0xFFFFF000]),
        )
        for number in range(6)
    ]
    made = []
    for turn in range(360):
        index = rng.randrange(len(flows))
        flow = flows[index]
        longest = MTU - flow.headers()
        size = rng.choice([longest, longest, 1, rng.randint(1, longest)])
        packet = replace(flow, payload=body(size, turn))
        segments = 1
        if rng.random() < 0.4:
            segments = rng.randint(2, min(64, (65535 - flow.headers()) // size))
            length = size * segments - rng.randrange(size)
            packet = replace(packet, payload=body(length, turn))
            packet = replace(packet, flags=rng.choice([ACK, ACK | PSH, ACK | FIN, ACK | CWR]))
            made.append(Input(*packet.super_packet(size)))
        else:
            made.append(Input(*_odd(packet, size, rng)))
        flows[index] = replace(
            flow,
            # Of IPv6 it is the flow label, by which a kernel peer chooses the source port.
            id=flow.id + segments & 0xFFFF if family == 4 else flow.id,
            sequence=flow.sequence + len(packet.payload) & 0xFFFFFFFF,
        )
    return tuple(made)


def _odd(packet: Packet, size: int, rng: random.Random) -> tuple[Vnet, bytes]:
    """One packet, often a plain one, else one that must not be joined or is wrong."""
    v4 = len(packet.source) == 4
    start = packet.transport_start()
    at = start + (16 if packet.protocol == TCP else 6)
    chance = rng.randrange(16)
    if chance == 0:
        vnet, octets = packet.super_packet(size)
        return replace(vnet, gso_type=0, gso_size=0, header_length=0), octets
    if chance == 1 and v4:
        fragment = rng.choice([MORE_FRAGMENTS, 40, MORE_FRAGMENTS | 80])
        return Vnet(), replace(packet, fragment=fragment).build()
    if chance == 2 and v4:
        packet = replace(packet, ip_options=b"\x01" * 8, payload=packet.payload[8:])
    elif chance == 3:
        flags = rng.choice([SYN, ACK | URG, ACK | ECE, ACK | ECE | CWR, FIN | ACK, PSH | ACK])
        packet = replace(packet, flags=flags, urgent=5)
    elif chance == 4:
        # Not ECT: a queue that stands would have it marked.
        tos = rng.randrange(64) << 2 | rng.choice([ECN_NOT_ECT, ECN_CE])
        packet = replace(packet, tos=tos, window=rng.randrange(65536))
    elif chance == 5:
        packet = replace(packet, payload=b"")
    octets = packet.build()
    if chance == 6:
        octets = octets[:at] + bytes([octets[at] ^ 0x55]) + octets[at + 1 :]
    if chance == 7 and packet.protocol == UDP:
        octets = octets[:at] + b"\0\0" + octets[at + 2 :]
    return Vnet(), octets


class Node:
    """One node's data plane, and a packet socket on its TUN."""

    def __init__(
        self,
        host: Host,
        number: int,
        family: int,
        offload: Offload,
        anti_spoofing: AntiSpoofing = AntiSpoofing.ENFORCE,
    ) -> None:
        self._closing = ExitStack()
        with inside(host):
            underlay = Underlay.open(host.iface, host.address, PORT, 4, offload=offload)
            self._closing.callback(underlay.close)
            tun = Tun.open("flannel.1", offload=offload)
            self._closing.callback(tun.delete)
            host.ip("link", "set", "flannel.1", "mtu", str(MTU), "txqueuelen", "5000", "up")
            self.raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK)
            self._closing.callback(self.raw.close)
            self.raw.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
            self.raw.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 32 << 20)
            self.raw.bind(("flannel.1", ETH_P_ALL))
        self._family = family
        self.context = Context(
            FastpathConfig(
                Vni(1), MACS[number], NETWORKS[family], inner_ipv4=family == 4,
                inner_ipv6=family == 6, anti_spoofing=anti_spoofing,
            )
        )  # fmt: skip
        self._closing.callback(self.context.close)
        io = WorkerIo(
            tun=tun.read_fds,
            tun_write=tun.write_fd,
            receive=underlay.receive_fds,
            send=underlay.send_fds,
            offload=tun.offload | underlay.offload,
        )
        assert io.offload == offload
        self.worker: Worker = self.context.worker(io)
        self._closing.callback(self.worker.close)

    def start(self, workers: Workers) -> None:
        """Let threads move the packets, unless it is the caller who does."""
        if workers is not Workers.LOOP:
            self.worker.start(THREADS[workers])

    def route_to(self, number: int, host: Host) -> None:
        """Know the other node."""
        subnet = SUBNETS[self._family][number]
        self.context.replace(Route(subnet, MACS[number], host.address, PORT))

    def drops(self) -> dict[str, int]:
        """Its drops, but for what the kernel's own IPv6 sends out of a TUN by itself."""
        own = ("encap_multicast", "encap_family")
        return {
            reason: count
            for reason, count in self.context.counters().drops.items()
            if reason not in own
        }

    def put(self, given: Input) -> None:
        """Send a packet out of the TUN."""
        kind = 0x0800 if self._family == 4 else 0x86DD
        self.raw.sendto(given.vnet.pack()[:10] + given.packet, ("flannel.1", kind))

    def take(self) -> list[bytes]:
        """Return what has come in through the TUN, cut into what was on the wire."""
        got: list[bytes] = []
        while True:
            try:
                octets, address = self.raw.recvfrom(70_000)
            except BlockingIOError:
                return got
            if address[2] == PACKET_OUTGOING:
                continue
            got += Input(Vnet.unpack(octets[:10] + b"\0\0"), octets[10:]).segments()

    def close(self) -> None:
        """Leave nothing behind."""
        self._closing.close()


@contextmanager
def cabled(underlay: str) -> Iterator[tuple[Host, Host]]:
    require_root()
    for program in ("ip", "bridge", "ethtool"):
        require_program(program)
    made = Lab(UNDERLAYS[underlay])
    try:
        made.start_switch()
        first, second = made.add_host(), made.add_host()
        made.cable(first, second)
        yield first, second
    finally:
        made.close()


def payload_of(packets: Iterable[bytes]) -> int:
    """Bytes that they carry."""
    return sum(len(packet) - twin.headers_of(packet) for packet in packets)


def put_all(
    family: int,
    put: Callable[[Input], None],
    receiver: Node,
    turn: Callable[[], object],
    measure: Callable[[list[bytes]], int] = len,
) -> list[bytes]:
    """Put every input in; what came out at the receiver once it measures as much."""
    got: list[bytes] = []
    expected, given = 0, inputs(family)
    for begin in range(0, len(given), TOGETHER):
        for one in given[begin : begin + TOGETHER]:
            put(one)
        expected += sum(map(measure, expected_of(family)[begin : begin + TOGETHER]))
        deadline = time.monotonic() + 30
        while measure(got) < expected:
            turn()
            select.select([receiver.raw], [], [], 0.001)
            got += receiver.take()
            assert time.monotonic() < deadline, (measure(got), expected, receiver.drops())
    assert measure(got) == expected
    assert not any(receiver.drops().values())
    return got


def by_flow(packets: list[bytes]) -> dict[tuple[bytes, ...], list[bytes]]:
    flows: dict[tuple[bytes, ...], list[bytes]] = {}
    for packet in packets:
        flows.setdefault(flow_of(packet), []).append(packet)
    return flows


def as_stream(packets: list[bytes]) -> list[bytes]:
    """What TCP carries in one piece, as where it is cut means nothing; others as they are."""
    if twin.flow_key(packets[0]) is None or (twin.ip_length(packets[0]) or ())[2:] != (TCP,):
        return packets
    return [b"".join(packet[twin.headers_of(packet) :] for packet in packets)]


def check(got: list[bytes], family: int, form: Callable[[list[bytes]], list[bytes]] = list) -> None:
    sent = [packet for segments in expected_of(family) for packet in segments]
    arrived = {flow: form(packets) for flow, packets in by_flow(got).items()}
    expected = {flow: form(packets) for flow, packets in by_flow(sent).items()}
    assert arrived.keys() == expected.keys()
    for flow, packets in expected.items():
        for number, (one, other) in enumerate(zip(arrived[flow], packets)):
            assert one == other, (flow, number)
        assert len(arrived[flow]) == len(packets)
