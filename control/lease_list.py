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
)
from pyflannel.dataplane.route import IPAddress


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


def recent_snapshot_reader(etcd: Etcd, prefix: str) -> SnapshotReader:
    """Return what gives the last answer again for a second, for steps that follow each other."""
    ask, last = snapshot_reader(etcd, prefix), None

    async def read() -> Snapshot:
        nonlocal last
        if last is None or time.monotonic() - last.asked_at > RECENT_SECONDS:
            last = await ask()
        return last

    return read


async def read_leases_of(read: SnapshotReader, public_ip: IPAddress) -> tuple[Lease, ...]:
    """List the leases of one host; EtcdUnavailable."""
    snapshot = await read()
    leases: list[Lease] = []
    for kv in snapshot.kvs:
        if may_be_of(kv, public_ip):
            with contextlib.suppress(BadLease):
                leases.append(parse_lease_untrusted(kv))
    return tuple(x for x in leases if x.attributes.public_ip == public_ip)


async def read_leases(etcd: Etcd, prefix: str) -> LeaseList:
    """List the leases of a network; EtcdUnavailable."""
    snapshot = await snapshot_reader(etcd, prefix)()
    leases: list[Lease] = []
    bad: dict[str, str] = {}
    for kv in snapshot.kvs:
        try:
            leases.append(parse_lease_untrusted(kv))
        except BadLease as error:
            bad[kv.key.decode("utf-8", "backslashreplace")] = str(error)
    return LeaseList(tuple(leases), bad)
