"""All leases that etcd has at one moment, for those who only look."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass

from pyflannel.control.etcd import Etcd
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


async def read_leases_of(etcd: Etcd, prefix: str, public_ip: IPAddress) -> tuple[Lease, ...]:
    """List the leases of one host; EtcdUnavailable."""
    snapshot = await etcd.snapshot(subnets_prefix(prefix) + "/")
    leases: list[Lease] = []
    for kv in snapshot.kvs:
        if may_be_of(kv, public_ip):
            with contextlib.suppress(BadLease):
                leases.append(parse_lease_untrusted(kv))
    return tuple(x for x in leases if x.attributes.public_ip == public_ip)


async def read_leases(etcd: Etcd, prefix: str) -> LeaseList:
    """List the leases of a network; EtcdUnavailable."""
    snapshot = await etcd.snapshot(subnets_prefix(prefix) + "/")
    leases: list[Lease] = []
    bad: dict[str, str] = {}
    for kv in snapshot.kvs:
        try:
            leases.append(parse_lease_untrusted(kv))
        except BadLease as error:
            bad[kv.key.decode("utf-8", "backslashreplace")] = str(error)
    return LeaseList(tuple(leases), bad)
