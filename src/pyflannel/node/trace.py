"""Says what would become of a packet to an address: the kernel's route, ours, and why.

It asks the tables that packets ask, the kernel's and the fast path's, and sends nothing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from pyflannel.control.lease import BadLease, parse_subnet_key_untrusted
from pyflannel.dataplane.interface import Reach
from pyflannel.dataplane.refusal import Refusal
from pyflannel.dataplane.route import IPAddress, IPNetwork, Route
from pyflannel.node.parts import Node


async def trace(node: Node, address: IPAddress) -> dict[str, Any]:
    """Return the routes a packet would take, whether it would be sent into the overlay, and why."""
    netlink, table, keeper, config = node.netlink, node.table, node.keeper, node.config
    if not (netlink and table and keeper and config and node.overlays):
        raise Refusal("the daemon is still starting; status tells what it waits for")
    kernel = await netlink.route_to(address)
    overlay = next((x for x in node.overlays if kernel and kernel.name == x.device), None)
    known = next((x for x in (y.context.lookup(address) for y in node.overlays) if x), None)
    is_direct = bool(known and kernel and kernel.gateway == known.underlay)
    found = None if overlay is None and not is_direct else known
    sender = None if overlay is None else overlay.underlying.choice.address
    below = None if found is None else await netlink.route_to(found.underlay, sender)
    own = keeper.own.subnet
    unused = {**table.quarantined(), **table.bad()}
    if found is not None and below is not None and is_direct:
        why = f"sent straight to {found.underlay} by {below.name}, on the same link (DirectRouting)"
    elif overlay is None and known and (refusal := _refusal(node, known.subnet)):
        instead = f", and sends it by {kernel.name}" if kernel else ""
        why = f"the kernel has refused the route to {known.subnet} ({refusal}){instead}"
    elif overlay is None:
        ranges = (subnets.network for subnets in config.ranges)
        network = next((x for x in ranges if x.version == address.version), None)
        why = _why_not_ours(
            address, kernel, network, () if own is None else own.parts, known, unused
        )
    else:
        why = _why(address, overlay.device, found, below, unused)
    return {
        "address": str(address),
        "kernel_route": None if kernel is None else _reach(kernel),
        "route": None
        if found is None
        else {
            "subnet": str(found.subnet),
            "vtep_mac": str(found.vtep_mac),
            "address": str(found.underlay),
            "port": found.port,
        },
        "underlay_route": None if below is None else _reach(below),
        "sent": below is not None,
        "why": why,
    }


def _reach(reach: Reach) -> dict[str, str | None]:
    return {
        "device": reach.name,
        "gateway": None if reach.gateway is None else str(reach.gateway),
        "source": None if reach.source is None else str(reach.source),
    }


def _refusal(node: Node, subnet: IPNetwork) -> str | None:
    """Return why the kernel has no route to a peer's subnet, None where it took it."""
    found = (overlay.refused.get(subnet) for overlay in node.overlays)
    return next((os.strerror(err) for err in found if err), None)


def _why_not_ours(
    address: IPAddress,
    kernel: Reach | None,
    network: IPNetwork | None,
    own: Sequence[IPNetwork],
    known: Route | None,
    unused: Mapping[str, str],
) -> str:
    """Return why the kernel does not hand a packet to our device."""
    if kernel is None:
        return "the kernel has no route to it, or one that forbids it; see `ip route get`"
    if kernel.name == "lo":
        return "it is an address of this host"
    for subnet in own:
        if address in subnet:
            return f"it is in this host's own subnet {subnet}, behind {kernel.name}"
    if network is None:
        return f"the network has no IPv{address.version}, and the kernel sends it by {kernel.name}"
    if known is not None:
        return (
            f"the kernel sends it by {kernel.name}: another route or rule hides the overlay's to "
            f"{known.subnet}; see `ip route get {address}` and `ip rule`"
        )
    if address in network:
        return f"the kernel sends it by {kernel.name}: {_why_no_route(address, unused)}"
    return f"it is outside the network {network}, and the kernel sends it by {kernel.name}"


def _why(
    address: IPAddress,
    device: str,
    found: Route | None,
    below: Reach | None,
    unused: Mapping[str, str],
) -> str:
    """Return what becomes of a packet that the kernel hands to our device."""
    if found is None:
        why = _why_no_route(address, unused)
        return f"dropped (no_route): the kernel routes it to {device}, but {why}"
    vtep = f"VTEP {found.vtep_mac} at {found.underlay} port {found.port}"
    if below is None:
        return f"dropped (send_unreachable): this host has no route to {vtep}"
    return f"sent to {vtep} by {below.name}"


def _why_no_route(address: IPAddress, unused: Mapping[str, str]) -> str:
    for key, why in unused.items():
        if _holds(key, address):
            return f"the lease {key} is not used: {why}"
    return "no lease holds it"


def _holds(key: str, address: IPAddress) -> bool:
    try:
        return any(address in part for part in parse_subnet_key_untrusted(key).parts)
    except BadLease:
        return False
