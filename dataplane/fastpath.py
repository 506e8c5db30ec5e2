"""Typed facade of the compiled fast path: errno becomes OSError, C structs become values.

The only module that imports `_fastpath`. It decides nothing and opens nothing.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from pyflannel.dataplane._fastpath import ffi, lib

from pyflannel.dataplane.offload import NO_OFFLOAD, Offload
from pyflannel.dataplane.route import IPAddress, IPNetwork, MacAddress, Route, Vni

PUSH_BYTES = 22
"""VXLAN header and inner Ethernet header, what encapsulation pushes."""

SUSPECTS_PER_CALL = 64
_SEGMENTS_BYTES = 1 << 20

DROP_REASONS: tuple[str, ...] = tuple(
    ffi.string(lib.fp_drop_name(reason)).decode() for reason in range(lib.FP_DROP_REASONS)
)
"""Names of the drop reasons, in the order of `enum fp_drop`."""


class AntiSpoofing(Enum):
    """What happens to a packet whose sender may not have sent it."""

    OFF = lib.FP_SPOOF_OFF
    LOG = lib.FP_SPOOF_LOG
    ENFORCE = lib.FP_SPOOF_ENFORCE


@dataclass(frozen=True, slots=True)
class FastpathConfig:
    """What the packet checks need to know; fixed for the life of a context.

    `peer_sources` pairs an outer source prefix with the subnet whose lease may send from there.
    """

    vni: Vni
    mac: MacAddress
    network: IPNetwork
    anti_spoofing: AntiSpoofing = AntiSpoofing.ENFORCE
    ignore_reserved_bits: bool = False
    peer_sources: tuple[tuple[IPNetwork, IPNetwork], ...] = ()
    inner_ipv4: bool = True
    inner_ipv6: bool = False


class Schedule(Enum):
    """How the threads of a worker are scheduled."""

    NORMAL = lib.FP_SCHEDULE_NORMAL
    RAISED = lib.FP_SCHEDULE_RAISED
    """Some nice steps above the daemon; more for a thread in which several flows are mixed."""
    REALTIME = lib.FP_SCHEDULE_REALTIME
    """SCHED_RR; the others have what the kernel reserves for them, 5 % by default."""


@dataclass(frozen=True, slots=True)
class WorkerIo:
    """The descriptors of a worker; packets are read from `tun` and written to `tun_write`.

    `poll_us`: how long a thread polls after the last packet before it sleeps, in microseconds.
    """

    tun: tuple[int, ...]
    tun_write: int
    receive: tuple[int, ...]
    send: tuple[int, ...]
    offload: Offload = NO_OFFLOAD
    poll_us: int = 0
    schedule: Schedule = Schedule.NORMAL


@dataclass(frozen=True, slots=True)
class Traffic:
    """Packets, and bytes of their inner IP packets, per direction."""

    encap_packets: int
    encap_bytes: int
    decap_packets: int
    decap_bytes: int


@dataclass(frozen=True, slots=True)
class Counters:
    """Sums since start; `drops` and `spoofed` (what mode `log` let pass) by drop reason.

    A read, send, receive or write moves one packet or a batch of them, so packets by it is the
    size of a batch.
    """

    traffic: Traffic
    drops: dict[str, int]
    spoofed: dict[str, int]
    congestion_marks: int
    tun_reads: int
    sends: int
    sends_unsegmented: int
    sends_blocked: int
    receives: int
    tun_writes: int


@dataclass(frozen=True, slots=True)
class PeerTraffic:
    """Counters of one route; `heard_at` in seconds of time.monotonic(), None if never."""

    subnet: IPNetwork
    traffic: Traffic
    drops: int
    heard_at: float | None


@dataclass(frozen=True, slots=True)
class Suspect:
    """A packet that failed a source check."""

    reason: str
    outer_source: IPAddress
    mac: MacAddress
    inner_source: IPAddress


@dataclass(frozen=True, slots=True)
class Encapsulated:
    """What encapsulation makes of a packet: the 22 bytes in front of it and where it goes."""

    header: bytes
    outer_tos: int
    flow: int
    route: Route


@dataclass(frozen=True, slots=True)
class Dropped:
    """A packet that is not passed on, with the name of the reason."""

    reason: str


_MAPPED = bytes(10) + b"\xff\xff"


def _octets(address: IPAddress) -> bytes:
    return address.packed if isinstance(address, IPv6Address) else _MAPPED + address.packed


def _length(network: IPNetwork) -> int:
    return network.prefixlen + (0 if isinstance(network, IPv6Network) else 96)


def _address(octets: bytes) -> IPAddress:
    return IPv4Address(octets[12:]) if octets[:12] == _MAPPED else IPv6Address(octets)


def _network(octets: bytes, length: int) -> IPNetwork:
    address = _address(octets)
    if isinstance(address, IPv4Address):
        return IPv4Network((address, length - 96))
    return IPv6Network((address, length))


def _traffic(traffic: ffi.CData) -> Traffic:
    return Traffic(
        traffic.encap_packets, traffic.encap_bytes, traffic.decap_packets, traffic.decap_bytes
    )


def _peer_traffic(peer: ffi.CData) -> PeerTraffic:
    return PeerTraffic(
        subnet=_network(bytes(peer.subnet), peer.subnet_len),
        traffic=_traffic(peer.traffic),
        drops=peer.drops,
        heard_at=peer.heard_ms / 1000 if peer.heard_ms else None,
    )


def _route(found: ffi.CData) -> Route:
    return Route(
        subnet=_network(bytes(found.subnet), found.subnet_len),
        vtep_mac=MacAddress(bytes(found.mac)),
        underlay=_address(bytes(found.underlay)),
        port=found.port,
        previous_mac=MacAddress(bytes(found.previous_mac)) if found.has_previous_mac else None,
    )


def segment(vnet: bytes, packet: bytes, gap: int = 0) -> list[bytes] | None:
    """Segment a packet of the TUN without I/O, for tests; None when the headers disagree.

    `gap`: bytes between segments, as room for what encapsulation pushes.
    """
    raw = ffi.new("uint8_t[]", _SEGMENTS_BYTES)
    raw[0 : len(packet)] = packet
    stride, total = ffi.new("size_t *"), ffi.new("size_t *")
    count = lib.fp_segment_check(vnet, raw, len(packet), gap, len(raw), stride, total)
    if count < 0:
        return None
    octets = bytes(ffi.buffer(raw, total[0]))
    starts = range(0, count * stride[0], stride[0])
    return [octets[at : at + stride[0] - (gap if count > 1 else 0)] for at in starts]


def coalesce(
    packets: Sequence[bytes], offload: Offload, hint: int = 0
) -> list[tuple[bytes, bytes]]:
    """Coalesce inner packets without I/O, for tests; return virtio-net headers and packets.

    `hint`: gso size of super-packets among `packets`, in bytes, as UDP_GRO tells it; 0: not known.
    """
    raw = ffi.new("uint8_t[]", b"".join(packets))
    lengths = ffi.new("size_t[]", [*map(len, packets)])
    into = ffi.new("uint8_t[]", len(raw) + 12 * len(packets))
    written = ffi.new("size_t[]", len(packets))
    tcp, udp = Offload.TSO in offload, Offload.USO in offload
    count = lib.fp_coalesce_check(
        tcp, udp, raw, lengths, len(packets), hint, into, len(into), written
    )
    if count < 0:
        raise MemoryError("coalescing")
    got, at = [], 0
    for length in written[0:count]:
        got.append((bytes(into[at : at + 12]), bytes(into[at + 12 : at + length])))
        at += length
    return got


def _check(err: int, what: str) -> None:
    if err:
        raise OSError(err, f"{what}: {os.strerror(err)}")


def _ended(err: int) -> OSError:
    reason = "the TUN device is gone" if err == errno.EBADFD else os.strerror(err)
    return OSError(err, reason)


class Context:
    """One VNI: its FIB and its counters. Close it after its workers."""

    def __init__(self, config: FastpathConfig) -> None:
        sources = ffi.new("struct fp_peer_source[]", max(1, len(config.peer_sources)))
        for entry, (source, subnet) in zip(sources, config.peer_sources):
            entry.source = _octets(source.network_address)
            entry.source_len = _length(source)
            entry.subnet = _octets(subnet.network_address)
            entry.subnet_len = _length(subnet)
        raw = ffi.new("struct fp_config *")
        raw.vni = config.vni
        raw.mac = config.mac.octets
        raw.network = _octets(config.network.network_address)
        raw.network_len = _length(config.network)
        raw.anti_spoofing = config.anti_spoofing.value
        raw.ignore_reserved_bits = config.ignore_reserved_bits
        raw.inner_ipv4 = config.inner_ipv4
        raw.inner_ipv6 = config.inner_ipv6
        raw.peer_sources = len(config.peer_sources)
        raw.peer_source = sources
        ctx = lib.fp_ctx_new(raw)
        if ctx == ffi.NULL:
            raise MemoryError("fast path context")
        self._ctx = ctx

    def replace(self, route: Route) -> None:
        """Publish a route; OSError EINVAL for a subnet of length 0, ENOMEM."""
        raw = ffi.new("struct fp_route *")
        raw.subnet = _octets(route.subnet.network_address)
        raw.subnet_len = _length(route.subnet)
        raw.mac = route.vtep_mac.octets
        raw.has_previous_mac = route.previous_mac is not None
        raw.previous_mac = route.previous_mac.octets if route.previous_mac else bytes(6)
        raw.underlay = _octets(route.underlay)
        raw.port = route.port
        _check(lib.fp_route_replace(self._ctx, raw), f"route to {route.subnet}")

    def delete(self, subnet: IPNetwork) -> bool:
        """Remove the route of a subnet; False if there is none."""
        err = lib.fp_route_delete(self._ctx, _octets(subnet.network_address), _length(subnet))
        if err == errno.ESRCH:
            return False
        _check(err, f"route to {subnet}")
        return True

    def lookup(self, address: IPAddress) -> Route | None:
        """Return the route that a packet to this address takes."""
        found = ffi.new("struct fp_route *")
        if lib.fp_route_lookup(self._ctx, _octets(address), found):
            return None
        return _route(found)

    def __len__(self) -> int:
        return int(lib.fp_route_count(self._ctx))

    def peers(self) -> Iterator[PeerTraffic]:
        """Yield the counters of every route, read now; any thread may iterate."""
        capacity = len(self) + 64
        raw = ffi.new("struct fp_peer_traffic[]", capacity)
        count = lib.fp_peers_traffic(self._ctx, raw, capacity)
        return (_peer_traffic(raw[i]) for i in range(count))

    def counters(self) -> Counters:
        """Return the sums over all workers."""
        raw = ffi.new("struct fp_counters *")
        lib.fp_counters_read(self._ctx, raw)
        return Counters(
            traffic=_traffic(raw.traffic),
            drops=dict(zip(DROP_REASONS, raw.drops)),
            spoofed=dict(zip(DROP_REASONS, raw.spoofed)),
            congestion_marks=raw.congestion_marks,
            tun_reads=raw.tun_reads,
            sends=raw.sends,
            sends_unsegmented=raw.sends_unsegmented,
            sends_blocked=raw.sends_blocked,
            receives=raw.receives,
            tun_writes=raw.tun_writes,
        )

    def take_suspects(self) -> list[Suspect]:
        """Return samples of packets that failed a source check since the last call."""
        raw = ffi.new("struct fp_suspect[]", SUSPECTS_PER_CALL)
        count = lib.fp_suspects_take(self._ctx, raw, SUSPECTS_PER_CALL)
        return [
            Suspect(
                reason=DROP_REASONS[suspect.reason],
                outer_source=_address(bytes(suspect.outer_source)),
                mac=MacAddress(bytes(suspect.mac)),
                inner_source=_address(bytes(suspect.inner_source)),
            )
            for suspect in raw[0:count]
        ]

    def encapsulate(self, packet: bytes) -> Encapsulated | Dropped:
        """Encapsulate one inner IP packet without I/O."""
        header = ffi.new("uint8_t[]", PUSH_BYTES)
        tos, flow = ffi.new("uint8_t *"), ffi.new("uint32_t *")
        found = ffi.new("struct fp_route *")
        drop = lib.fp_encap_check(self._ctx, packet, len(packet), header, tos, flow, found)
        if drop >= 0:
            return Dropped(DROP_REASONS[drop])
        return Encapsulated(bytes(header), tos[0], flow[0], _route(found))

    def decapsulate(
        self, datagram: bytes, outer_source: IPAddress, outer_tos: int = 0
    ) -> bytes | Dropped:
        """Decapsulate one UDP payload without I/O; return the inner IP packet."""
        raw = ffi.new("uint8_t[]", datagram or b"\0")
        offset, length = ffi.new("size_t *"), ffi.new("size_t *")
        drop = lib.fp_decap_check(
            self._ctx, raw, len(datagram), _octets(outer_source), outer_tos, offset, length
        )
        if drop >= 0:
            return Dropped(DROP_REASONS[drop])
        return bytes(raw[offset[0] : offset[0] + length[0]])

    def worker(self, io: WorkerIo) -> Worker:
        """Make a worker over non-blocking descriptors, which stay the caller's; OSError."""
        tun, receive, send = (ffi.new("int[]", list(fds)) for fds in (io.tun, io.receive, io.send))
        raw = ffi.new("struct fp_io *")
        raw.tun_count, raw.tun, raw.tun_write = len(io.tun), tun, io.tun_write
        raw.receive_count, raw.receive = len(io.receive), receive
        raw.send_count, raw.send = len(io.send), send
        raw.segment = Offload.GSO in io.offload
        raw.coalesce_tcp = Offload.TSO in io.offload
        raw.coalesce_udp = Offload.USO in io.offload
        raw.poll_us = io.poll_us
        raw.schedule = io.schedule.value
        worker = lib.fp_worker_new(self._ctx, raw)
        if worker == ffi.NULL:
            raise OSError(ffi.errno, f"packet worker: {os.strerror(ffi.errno)}")
        return Worker(worker)

    def close(self) -> None:
        """Free the context, whose workers are closed; TypeError for any use of it afterwards."""
        lib.fp_ctx_free(self._ctx)
        self._ctx = None  # which cffi refuses, where NULL would end the process


class Worker:
    """Moves packets between TUN queues and the UDP sockets.

    Either the caller turns it when `fileno` is readable, or `start` lets threads do so until
    `close`; then `fileno` is readable when one of them has failed.
    """

    def __init__(self, raw: ffi.CData) -> None:
        self._worker = raw

    def fileno(self) -> int:
        """Return the descriptor for the event loop; another one after `start`."""
        return int(lib.fp_worker_fd(self._worker))

    def turn(self) -> int:
        """Do a bounded amount of work without blocking; return packets read and received.

        OSError EBADFD when the TUN device is gone. The GIL is released meanwhile.
        """
        packets: int = lib.fp_worker_turn(self._worker)
        if packets < 0:
            raise _ended(-packets)
        return packets

    def start(self, threads: int) -> None:
        """Let threads do the turns: 1, 2 (one for each direction) or 3 (two of them for bulk).

        After an OSError only `close` may follow.
        """
        _check(lib.fp_worker_start(self._worker, threads), "packet threads")

    def check(self) -> None:
        """Raise the OSError with which a thread has ended: EBADFD, the TUN device is gone."""
        err = lib.fp_worker_error(self._worker)
        if err:
            raise _ended(err)

    @property
    def runs_as_scheduled(self) -> bool:
        """Whether every thread got the schedule it was to have; false without CAP_SYS_NICE."""
        return not int(lib.fp_worker_schedule_error(self._worker))

    @property
    def threads(self) -> int:
        """How many threads move packets now: 0 when `turn` does; of three those that have work."""
        return int(lib.fp_worker_threads(self._worker))

    def silence(self) -> float:
        """Return for how many seconds the slowest thread has been in its turn; 0 without threads.

        Threads that have nothing to do turn every second.
        """
        return float(lib.fp_worker_silence_ms(self._worker)) / 1000

    def close(self) -> None:
        """End the threads behind their present batch, send what was read, within a second, and
        free the worker, as Context.close(); the context keeps its counters.
        """
        lib.fp_worker_free(self._worker)
        self._worker = None
