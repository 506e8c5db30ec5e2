"""What a running node says about itself, as values that become JSON.

It reads the node's parts and changes nothing. Ages and durations are in seconds, a field that is
not known is null. The names are an interface: programs read them by `status --json`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from ipaddress import ip_address
from typing import Any

from pyflannel.control.lease import LEASE_TTL_SECONDS
from pyflannel.control.own_lease import OwnLease
from pyflannel.dataplane.fastpath import PeerTraffic, Traffic
from pyflannel.dataplane.proc_net import network_namespace
from pyflannel.dataplane.refusal import Refusal
from pyflannel.dataplane.route import Route
from pyflannel.management.control_socket import Request
from pyflannel.node.lease_value import leases_value
from pyflannel.node.overlay import Overlay
from pyflannel.node.parts import Node
from pyflannel.node.trace import trace

Json = dict[str, Any]


def requests(node: Node) -> dict[str, Request]:
    """Return the requests of the control socket that show the node."""

    async def _status(_: Mapping[str, Any], __: socket.socket) -> object:
        return await status(node)

    async def _peers(_: Mapping[str, Any], __: socket.socket) -> object:
        return await peers(node)

    async def _leases(_: Mapping[str, Any], __: socket.socket) -> object:
        return leases(node)

    async def _trace(request: Mapping[str, Any], _: socket.socket) -> object:
        try:
            address = ip_address(str(request.get("address")))
        except ValueError:
            raise Refusal(f"{request.get('address')!r:.80} is not an IP address") from None
        return await trace(node, address)

    return {"status": _status, "peers": _peers, "leases": _leases, "trace": _trace}


async def status(node: Node) -> Json:
    """Return the whole picture: lease, etcd, devices, counters, peers."""
    config = node.config
    return {
        "version": version("pyflannel-udp"),
        "pid": os.getpid(),
        "network_namespace": network_namespace(),
        "uptime_seconds": time.monotonic() - node.started,
        "ready": node.readiness.is_ready,
        "reasons": dict(node.readiness.reasons),
        "network": None
        if config is None
        else {
            "prefix": node.options.etcd_prefix,
            "ipv4": str(config.ipv4.network),
            "ipv6": None if config.ipv6 is None else str(config.ipv6.network),
            "vni": int(config.backend.vni),
            "port": config.backend.port,
        },
        "lease": None if node.keeper is None else _own_lease(node.keeper.own),
        "etcd": _etcd(node),
        "devices": [_device(node, overlay) for overlay in node.overlays],
        "peers": await peers(node),
    }


def _own_lease(own: OwnLease) -> Json:
    left = None if own.expires_at is None else own.expires_at - time.time()
    return {
        "state": own.state.value,
        "subnet": None if own.subnet is None else str(own.subnet.ipv4),
        "subnet_ipv6": _text(None if own.subnet is None else own.subnet.ipv6),
        "public_ip": str(own.public_ip),
        "public_ipv6": _text(own.public_ipv6),
        "vtep_mac": str(own.vtep_mac),
        "vtep_mac_ipv6": _text(own.vtep_mac_v6),
        "reservation": own.is_reservation,
        "age_seconds": None if left is None else LEASE_TTL_SECONDS - left,
        "expires_in_seconds": left,
        "renewals": own.renewals,
        "losses": own.losses,
    }


def _etcd(node: Node) -> Json | None:
    if node.etcd is None:
        return None
    session = node.etcd.session
    view = None if node.sync is None else node.sync.view
    return {
        "state": session.state.value,
        "endpoint": session.endpoint,
        "revision": session.revision,
        "silence_seconds": session.silence_seconds,
        "last_error": session.last_error or None,
        "last_error_seconds": session.last_error_seconds,
        "view": None if view is None else dataclasses.asdict(view),
    }


def _device(node: Node, overlay: Overlay) -> Json:
    underlying = overlay.underlying
    counters = overlay.counters()
    return {
        "name": overlay.device,
        "mtu": underlying.mtu,
        "interface": underlying.choice.name,
        "address": str(underlying.choice.address),
        "public_ip": str(underlying.public_ip),
        "offloads": str(overlay.offload),
        "receive_buffer_bytes": overlay.receive_buffer,
        "workers": node.options.workers,
        "threads": overlay.threads,
        **dataclasses.asdict(counters.traffic),
        "drops": {reason: count for reason, count in counters.drops.items() if count},
    }


async def peers(node: Node) -> list[Json]:
    """Return each peer in use with its counters, in the order of subnets.

    Made in a thread: 10,000 peers take 0.2 s.
    """
    counted = [overlay.context.peers() for overlay in node.overlays]
    routes = () if node.table is None else node.table.routes()
    work = partial(_peers, routes, counted, time.monotonic())
    return await asyncio.get_running_loop().run_in_executor(None, work)


def _peers(
    routes: Sequence[Route], counted: Sequence[Iterator[PeerTraffic]], now: float
) -> list[Json]:
    traffic = {peer.subnet: peer for those in counted for peer in those}
    return [_peer(route, traffic.get(route.subnet), now) for route in _sorted(routes)]


def _sorted(routes: Iterable[Route]) -> list[Route]:
    return sorted(routes, key=lambda x: (x.subnet.version, int(x.subnet.network_address)))


def _peer(route: Route, counted: PeerTraffic | None, now: float) -> Json:
    heard_at = None if counted is None else counted.heard_at
    return {
        "subnet": str(route.subnet),
        "vtep_mac": str(route.vtep_mac),
        "address": str(route.underlay),
        "port": route.port,
        # A route that came this moment has no counters yet.
        **dataclasses.asdict(Traffic(0, 0, 0, 0) if counted is None else counted.traffic),
        "drops": 0 if counted is None else counted.drops,
        "last_seen_seconds": None if heard_at is None else max(0.0, now - heard_at),
    }


def leases(node: Node) -> Json:
    """Return all leases that the node knows, and what it does not use with the reason."""
    table = node.table
    if table is None:
        raise Refusal("the daemon has not read the leases yet; status tells what it waits for")
    unused = {**table.quarantined(), **table.bad()}
    return leases_value(table.leases(), unused, node.options.etcd_prefix)


def _text(value: object) -> str | None:
    return None if value is None else str(value)
