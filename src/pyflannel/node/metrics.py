"""Renders the state of the node and the counters of the fast path for Prometheus.

`read` looks at the node, on the event loop, in a moment; `render` makes the text, in any thread,
because with thousands of peers that takes longer than packets may wait. Written by hand, as the
client library takes four times as long. Names follow Prometheus' conventions: base units, `_total`
for counters, times as Unix timestamps.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version

from pyflannel.control.etcd_session import EtcdSession
from pyflannel.control.lease import LEASE_TTL_SECONDS
from pyflannel.control.own_lease import LeaseState, OwnLease
from pyflannel.control.route_sync import LeaseView
from pyflannel.dataplane.fastpath import Counters, PeerTraffic
from pyflannel.dataplane.offload import Offload
from pyflannel.node.parts import Node

PREFIX = "pyflannel_"
DIRECTIONS = ("encap", "decap")

Sample = tuple[str, float]
"""Labels as they are written, without braces, and the value."""


@dataclass(frozen=True, slots=True)
class Device:
    """What is told of one device; `peers` is read already and yet to be decoded."""

    name: str
    mtu: int
    offload: Offload
    counters: Counters
    peers: Iterator[PeerTraffic]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The node at one moment; None or empty where it is not up yet. Times are of the wall clock.

    `leases` is the number of peers, quarantined, bad and unconfirmed leases.
    """

    now: float
    monotonic: float
    started: float
    reasons: tuple[str, ...]
    leases: tuple[int, int, int, int] | None
    own: OwnLease | None
    etcd: EtcdSession | None
    view: LeaseView | None
    devices: tuple[Device, ...]


def read(node: Node) -> Snapshot:
    """Look at the node, without stopping a packet."""
    now, monotonic, table = time.time(), time.monotonic(), node.table
    per_peer = node.options.metrics_per_peer
    return Snapshot(
        now=now,
        monotonic=monotonic,
        started=now - (monotonic - node.started),
        reasons=tuple(node.readiness.reasons),
        leases=None
        if table is None
        else (
            len(table.routes()),
            len(table.quarantined()),
            len(table.bad()),
            len(table.unconfirmed()),
        ),
        own=None if node.keeper is None else node.keeper.own,
        etcd=None if node.etcd is None else node.etcd.session,
        view=None if node.sync is None else node.sync.view,
        devices=tuple(
            Device(
                overlay.device,
                overlay.underlying.mtu,
                overlay.offload,
                overlay.counters(),
                overlay.context.peers() if per_peer else iter(()),
            )
            for overlay in node.overlays
        ),
    )


async def page(node: Node) -> bytes:
    """Return the metrics page; the text is made in a thread."""
    return await asyncio.get_running_loop().run_in_executor(None, render, read(node))


def render(snapshot: Snapshot) -> bytes:
    """Return the page in Prometheus' text format 0.0.4."""
    lines: list[str] = []
    for family in (_node, _leases, _own_lease, _etcd, _devices, _peers):
        lines += family(snapshot)
    return ("\n".join(lines) + "\n").encode()


def _family(name: str, text: str, samples: Iterable[Sample]) -> Iterator[str]:
    """Yield one metric with its samples; its type is in its name."""
    kind = "counter" if name.endswith("_total") else "gauge"
    yield f"# HELP {PREFIX}{name} {text}"
    yield f"# TYPE {PREFIX}{name} {kind}"
    for labels, value in samples:
        yield f"{PREFIX}{name}{{{labels}}} {value}" if labels else f"{PREFIX}{name} {value}"


def _one(name: str, text: str, value: float | None) -> Iterator[str]:
    if value is not None:
        yield from _family(name, text, [("", value)])


def _node(found: Snapshot) -> Iterator[str]:
    build = f'version="{version("pyflannel-udp")}"'
    yield from _family("build_info", "1, with the version as a label.", [(build, 1)])
    yield from _one("start_time_seconds", "When the daemon started.", found.started)
    yield from _one("ready", "1 when the node is ready.", int(not found.reasons))
    reasons = [(f'reason="{reason}"', 1) for reason in found.reasons]
    yield from _family("not_ready", "1 for each reason why the node is not ready.", reasons)


def _leases(found: Snapshot) -> Iterator[str]:
    if found.leases is None:
        return
    peers, quarantined, bad, unconfirmed = found.leases
    yield from _one("peers", "Peers in the table.", peers)
    yield from _one("quarantined_leases", "Leases not used because they conflict.", quarantined)
    yield from _one("bad_leases", "Keys or values in etcd that are not leases.", bad)
    yield from _one("unconfirmed_leases", "Peers in use that etcd has lost.", unconfirmed)


def _own_lease(found: Snapshot) -> Iterator[str]:
    own = found.own
    if own is None:
        return
    states = [(f'state="{state.value}"', int(state is own.state)) for state in LeaseState]
    yield from _family("lease_state", "1 for the state that our lease is in.", states)
    if own.expires_at is not None:
        age = found.now - own.expires_at + LEASE_TTL_SECONDS
        yield from _one("lease_expiry_timestamp_seconds", "When our lease ends.", own.expires_at)
        yield from _one("lease_age_seconds", "Time since our lease was renewed.", age)
    yield from _one("lease_renewals_total", "Renewals of our lease.", own.renewals)
    yield from _one("lease_losses_total", "How often our lease was gone.", own.losses)


def _etcd(found: Snapshot) -> Iterator[str]:
    etcd, view = found.etcd, found.view
    if etcd is None:
        return
    yield from _one("etcd_up", "1 when etcd answered the last request.", int(etcd.is_well))
    yield from _one("etcd_revision", "Revision of etcd's last answer.", etcd.revision)
    yield from _one("etcd_silence_seconds", "Time since etcd's last answer.", etcd.silence_seconds)
    yield from _one("etcd_failures_total", "Rounds that no endpoint answered.", etcd.failures)
    yield from _one("etcd_endpoint_changes_total", "Changes of the endpoint.", etcd.moves)
    if view is None:
        return
    yield from _one("etcd_watching", "1 while the leases are watched.", int(view.is_following))
    yield from _one(
        "etcd_view_age_seconds", "Time since the table is known to equal etcd.", view.age_seconds
    )
    yield from _one("etcd_snapshots_total", "Lists of all leases.", view.snapshots)


_IO = (
    ("tun_reads", "Reads of the TUN; each brings one packet or super-packet."),
    ("tun_writes", "Writes to the TUN; each takes one packet or super-packet."),
    ("sends", "Datagram messages sent; each carries one packet or a batch."),
    ("sends_unsegmented", "Sends that were repeated packet by packet."),
    ("sends_blocked", "Sends that waited for the socket."),
    ("receives", "Datagram messages received; each carries one packet or a batch."),
)


def _devices(found: Snapshot) -> Iterator[str]:
    if not found.devices:
        return
    named = [(f'device="{x.name}"', x, x.counters.traffic) for x in found.devices]
    for what, text in (("packets", "Packets."), ("bytes", "Inner IP bytes.")):
        yield from _family(
            f"{what}_total",
            text,
            [
                (f'{device},direction="{way}"', getattr(traffic, f"{way}_{what}"))
                for device, _, traffic in named
                for way in DIRECTIONS
            ],
        )
    for what, text in (
        ("drops", "Packets dropped."),
        ("spoofed", "Packets let through that --anti-spoofing=enforce would drop."),
    ):
        yield from _family(
            f"{what}_total",
            text,
            [
                (f'{device},reason="{reason}"', count)
                for device, x, _ in named
                for reason, count in getattr(x.counters, what).items()
            ],
        )
    for what, text in _IO:
        yield from _family(
            f"{what}_total", text, [(device, getattr(x.counters, what)) for device, x, _ in named]
        )
    offloads = [
        (f'{device},offload="{offload}"', int(offload in x.offload))
        for device, x, _ in named
        for offload in Offload
    ]
    yield from _family("offload", "1 for each offload in use.", offloads)
    mtus = [(device, x.mtu) for device, x, _ in named]
    yield from _family("mtu_bytes", "MTU of packets inside the overlay.", mtus)


def _peers(found: Snapshot) -> Iterator[str]:
    """Yield the series of each peer; the one part whose length grows with the cluster."""
    packets: list[str] = []
    size: list[str] = []
    drops: list[str] = []
    heard: list[str] = []
    for device in found.devices:
        for peer in device.peers:
            name, traffic = f'{{subnet="{peer.subnet}"', peer.traffic
            packets += (
                f'{PREFIX}peer_packets_total{name},direction="encap"}} {traffic.encap_packets}',
                f'{PREFIX}peer_packets_total{name},direction="decap"}} {traffic.decap_packets}',
            )
            size += (
                f'{PREFIX}peer_bytes_total{name},direction="encap"}} {traffic.encap_bytes}',
                f'{PREFIX}peer_bytes_total{name},direction="decap"}} {traffic.decap_bytes}',
            )
            drops.append(f"{PREFIX}peer_drops_total{name}}} {peer.drops}")
            if peer.heard_at is not None:
                when = found.now - found.monotonic + peer.heard_at
                heard.append(f"{PREFIX}peer_last_seen_timestamp_seconds{name}}} {when:.3f}")
    if not packets:
        return
    for family, text, lines in (
        ("peer_packets_total", "Packets to and from a peer.", packets),
        ("peer_bytes_total", "Inner IP bytes to and from a peer.", size),
        ("peer_drops_total", "Packets to or from a peer that were dropped.", drops),
        ("peer_last_seen_timestamp_seconds", "When a packet of a peer came last.", heard),
    ):
        yield from _family(family, text, ())
        yield from lines
