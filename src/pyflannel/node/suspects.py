"""Tells the operator who failed a source check: once per source, naming the lease and the remedy.

It reads samples from the fast path and looks their MAC up among the leases; it drops nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable

from pyflannel.control.lease import Lease
from pyflannel.dataplane.fastpath import Context, Suspect

log = logging.getLogger(__name__)

INTERVAL_SECONDS = 1.0
SOURCES_REMEMBERED = 4096


def describe(suspect: Suspect, leases: Iterable[Lease], verb: str) -> str:
    """Return one sentence about a suspect: what was seen, whose MAC it is, what to do."""
    parts = (lease.part(suspect.outer_source.version) for lease in leases)
    owner = next((x for x in parts if x and x.vtep and x.vtep.mac == suspect.mac), None)
    seen = f"{verb} packets from {suspect.outer_source} (inner source MAC {suspect.mac})"
    if suspect.reason == "inner_source":
        return (
            f"{seen}: inner source {suspect.inner_source} is not in the sender's subnet; "
            f"look for a misconfigured route or spoofing on {suspect.outer_source}"
        )
    if owner is None:
        return (
            f"{seen}: no lease has this address and MAC; a node that left the cluster, "
            "a VTEP whose lease is stale, or a forged packet"
        )
    source = suspect.outer_source
    return (
        f"{seen}: the MAC belongs to lease {owner.subnet}, which advertises {owner.public_ip}; if "
        f"that node really sends from there (NAT), start with "
        f"--peer-source={source}/{source.max_prefixlen}={owner.subnet}"
    )


async def report_suspects(
    context: Context, leases: Callable[[], Iterable[Lease]], *, dropped: bool
) -> None:
    """Log each new (source, reason) once; never returns."""
    verb = "dropping" if dropped else "accepting (--anti-spoofing=log)"
    seen: dict[tuple[object, str], None] = {}
    while True:
        await asyncio.sleep(INTERVAL_SECONDS)
        for suspect in context.take_suspects():
            key = (suspect.outer_source, suspect.reason)
            if key in seen:
                continue
            if len(seen) == SOURCES_REMEMBERED:
                del seen[next(iter(seen))]
            seen[key] = None
            log.warning("%s", describe(suspect, leases(), verb))
