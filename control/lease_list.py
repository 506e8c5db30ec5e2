"""All leases that etcd has at one moment, read and judged one by one."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from pyflannel.control.etcd import Etcd, Snapshot
from pyflannel.control.lease import (
    BadLease,
    Lease,
    may_be_of,
    parse_lease_untrusted,
    subnets_prefix,
    text_of,
)
from pyflannel.dataplane.route import IPAddress, MacAddress


@dataclass(frozen=True, slots=True)
class LeaseList:
    """Leases, and the reason by key for what is none."""

    leases: tuple[Lease, ...]
    bad: Mapping[str, str]


SnapshotReader = Callable[[], Awaitable[Snapshot]]
"""Reads all leases of a network; EtcdUnavailable."""

RECENT_SECONDS = 1.0


def snapshot_reader(etcd: Etcd, prefix: str) -> SnapshotReader:
    """Return what asks etcd each time."""
    # Keys are `<prefix>/subnets/…`; the slash keeps out others that begin alike.
    return lambda: etcd.snapshot(subnets_prefix(prefix) + "/")


class RecentSnapshot:
    """Gives the last answer again for a second, to steps that follow each other."""

    def __init__(self, etcd: Etcd, prefix: str) -> None:
        self._ask = snapshot_reader(etcd, prefix)
        self._last: Snapshot | None = None
        self._came_at = 0.0

    async def read(self) -> Snapshot:
        """Return all leases as they were not long ago; EtcdUnavailable."""
        if self._last is None or time.monotonic() - self._came_at > RECENT_SECONDS:
            self._last = await self._ask()
            self._came_at = time.monotonic()
        return self._last

    def forget(self) -> None:
        """Ask anew at the next `read`."""
        self._last = None


async def read_leases_of(read: SnapshotReader, public_ip: IPAddress) -> tuple[Lease, ...]:
    """List the leases of one host; EtcdUnavailable."""
    leases = _that_may_be_of(await read(), public_ip)
    return tuple(x for x in leases if x.attributes.public_ip == public_ip)


async def read_leases_with(
    read: SnapshotReader, mac: MacAddress, version: int
) -> tuple[Lease, ...]:
    """List the leases whose VTEP of an address family has this MAC; EtcdUnavailable."""
    parts = [(x, x.part(version)) for x in _that_may_be_of(await read(), mac)]
    return tuple(lease for lease, part in parts if part and part.vtep and part.vtep.mac == mac)


def _that_may_be_of(snapshot: Snapshot, told: IPAddress | MacAddress) -> list[Lease]:
    leases: list[Lease] = []
    for kv in snapshot.kvs:
        if may_be_of(kv, told):
            with contextlib.suppress(BadLease):
                leases.append(parse_lease_untrusted(kv))
    return leases


async def read_leases(etcd: Etcd, prefix: str) -> LeaseList:
    """List the leases of a network; EtcdUnavailable."""
    snapshot = await snapshot_reader(etcd, prefix)()
    leases: list[Lease] = []
    bad: dict[str, str] = {}
    for kv in snapshot.kvs:
        try:
            leases.append(parse_lease_untrusted(kv))
        except BadLease as error:
            bad[text_of(kv.key)] = str(error)
    return LeaseList(tuple(leases), bad)
