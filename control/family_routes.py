"""What one address family uses of the leases: which are sound, which hold a subnet, which routes.

Does no I/O and knows no keys of etcd beyond their bytes. A lease that conflicts in one family is
quarantined there and used in the other. Source: decisions 10, 14.
"""

from __future__ import annotations

import logging
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from pyflannel.control.lease import Lease, LeasePart, text_of
from pyflannel.dataplane.route import (
    Delete,
    IPAddress,
    IPNetwork,
    MacAddress,
    Replace,
    Route,
    RouteChange,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Place:
    """Where we are in one family: its overlay network, address and MAC that peers know us by."""

    network: IPNetwork
    public_ip: IPAddress
    vtep_mac: MacAddress | None = None


class _Judged(NamedTuple):
    """What a lease says about a family, and whether and how it could be used, others aside."""

    lease: Lease
    subnet: IPNetwork | None
    why_unusable: str | None
    route: Route | None


class FamilyRoutes:
    """The routes of one family; every lease given to it is a peer's and of our backend."""

    def __init__(self, place: Place, port: int) -> None:
        self.version = place.network.version
        self.own_subnet: IPNetwork | None = None
        self.routes: dict[IPNetwork, Route] = {}
        self.quarantined: dict[bytes, str] = {}
        self._network = place.network
        self.own_public_ip = place.public_ip
        self._own_mac = place.vtep_mac
        self._port = port
        self._previous_mac: dict[bytes, MacAddress] = {}
        self._claims = _Claims()
        self._judged: dict[bytes, _Judged] = {}
        """Of the leases last seen, so that `settle` looks only at those that changed."""
        self._judged_by: tuple[IPNetwork | None, IPAddress] | None = None

    def note_change(self, key: bytes, old: Lease, new: Lease) -> None:
        """Remember the MAC that packets under way still carry."""
        was, now = _mac(old, self.version), _mac(new, self.version)
        if was is not None and now != was:
            self._previous_mac[key] = was

    def forget(self, key: bytes) -> None:
        """Drop what is remembered of a key that is gone."""
        self._previous_mac.pop(key, None)
        self._judged.pop(key, None)

    def can_use(self, lease: Lease) -> bool:
        """Whether this family uses a lease, or could as far as other leases let it."""
        part = lease.part(self.version)
        return part is None or self._why_unusable(part) is None

    def update(self, key: bytes, lease: Lease) -> tuple[RouteChange, ...]:
        """Route to a lease that has changed, and that holds its subnet."""
        part = lease.part(self.version)
        if part is None:
            return ()
        old, new = self.routes.pop(part.subnet, None), self._route(key, part)
        if new is None:
            return (Delete(old.subnet),) if old is not None else ()
        self.routes[new.subnet] = new
        return (Replace(new),) if new != old else ()

    def remove(self, lease: Lease) -> tuple[RouteChange, ...]:
        """Take out a lease while nothing is quarantined."""
        part = lease.part(self.version)
        if part is None:
            return ()
        self._claims.release(part.subnet)
        gone = self.routes.pop(part.subnet, None)
        return (Delete(gone.subnet),) if gone is not None else ()

    def load(self, leases: Iterable[tuple[bytes, Lease]]) -> tuple[RouteChange, ...]:
        """Take in leases that are younger than all before, as `settle` of all would."""
        self._judged_by = (self.own_subnet, self.own_public_ip)
        changes = []
        for key, lease in leases:
            one = self._judged[key] = self._judge_one(key, lease)
            route = self._admit(key, one)
            if route is not None:
                self.routes[route.subnet] = route
                changes.append(Replace(route))
        return tuple(changes)

    def settle(self, leases: Iterable[tuple[bytes, Lease]]) -> tuple[RouteChange, ...]:
        """Derive everything anew from all leases, the first of conflicting ones wins."""
        wanted: dict[IPNetwork, Route] = {}
        self.quarantined = {}
        self._claims = _Claims()
        for key, one in self._judge(leases).items():
            route = self._admit(key, one)
            if route is not None:
                wanted[route.subnet] = route
        changes: list[RouteChange] = [Delete(x) for x in self.routes if x not in wanted]
        changes += [Replace(x) for x in wanted.values() if self.routes.get(x.subnet) != x]
        self.routes = wanted
        return tuple(changes)

    def _admit(self, key: bytes, one: _Judged) -> Route | None:
        """Let a lease hold its subnet, or quarantine it; return its route if it has one."""
        if one.subnet is None:
            return None
        why = one.why_unusable or self._claims.claim(one.subnet, key)
        if why:
            self.quarantined[key] = why
            return None
        return one.route

    def _judge(self, leases: Iterable[tuple[bytes, Lease]]) -> Mapping[bytes, _Judged]:
        """Judge each lease by itself, in their order, unless that is done and holds."""
        by = (self.own_subnet, self.own_public_ip)
        before = self._judged if by == self._judged_by else {}
        self._judged_by, self._judged = by, {}
        for key, lease in leases:
            known = before.get(key)
            if known is None or known.lease is not lease:
                known = self._judge_one(key, lease)
            self._judged[key] = known
        return self._judged

    def _judge_one(self, key: bytes, lease: Lease) -> _Judged:
        part = lease.part(self.version)
        if part is None:
            return _Judged(lease, None, None, None)
        why = self._why_unusable(part)
        return _Judged(lease, part.subnet, why, None if why else self._route(key, part))

    def _route(self, key: bytes, part: LeasePart) -> Route | None:
        """Return the route to a peer, None until it has published address and MAC."""
        if part.vtep is None or part.public_ip is None:
            return None
        return Route(
            subnet=part.subnet,
            vtep_mac=part.vtep.mac,
            underlay=part.public_ip,
            port=self._port,
            previous_mac=self._previous_mac.get(key),
        )

    def _why_unusable(self, part: LeasePart) -> str | None:
        subnet = part.subnet
        if part.public_ip is not None and (why := self._why_not_a_peer(part.public_ip)):
            return why
        # Each side would take the other's packets for its own that came back.
        if part.vtep is not None and part.vtep.mac == self._own_mac:
            return (
                f"its VTEP MAC {part.vtep.mac} is our own; one of the two hosts is a copy of the "
                "other, or it is an old lease of ours"
            )
        if not _contains(self._network, subnet):
            return f"its subnet {subnet} is not inside the network {self._network}"
        if self.own_subnet is not None and subnet.overlaps(self.own_subnet):
            return f"its subnet {subnet} overlaps our own {self.own_subnet}"
        return None

    def _why_not_a_peer(self, address: IPAddress) -> str | None:
        name = "PublicIP" if self.version == 4 else "PublicIPv6"
        if address == self.own_public_ip:
            return (
                f"its {name} {address} is our own; another host uses the same address, or it is "
                "an old lease of ours"
            )
        if address.is_unspecified or address.is_loopback or address.is_multicast:
            return f"its {name} {address} cannot be a host's"
        if address in self._network:
            return f"its {name} {address} lies inside the overlay network {self._network}"
        return None


def _mac(lease: Lease, version: int) -> MacAddress | None:
    part = lease.part(version)
    return None if part is None or part.vtep is None else part.vtep.mac


def _contains(network: IPNetwork, subnet: IPNetwork) -> bool:
    return subnet.prefixlen >= network.prefixlen and subnet.network_address in network


class _Claims:
    """Which lease holds which subnet; none overlap, so the neighbours tell of a clash."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._held: dict[int, tuple[int, bytes]] = {}

    def claim(self, subnet: IPNetwork, key: bytes) -> str | None:
        """Take the subnet, or return why it cannot be had."""
        start, end = _span(subnet)
        at = bisect_right(self._starts, start)
        if at:
            before_end, holder = self._held[self._starts[at - 1]]
            if start < before_end:
                return f"its subnet overlaps that of the older lease {text_of(holder)}"
        if at < len(self._starts) and self._starts[at] < end:
            holder = self._held[self._starts[at]][1]
            return f"its subnet holds that of the older lease {text_of(holder)}"
        self._starts.insert(at, start)
        self._held[start] = (end, key)
        return None

    def release(self, subnet: IPNetwork) -> None:
        """Give back a claimed subnet."""
        start, _ = _span(subnet)
        del self._held[start]
        del self._starts[bisect_left(self._starts, start)]


def _span(subnet: IPNetwork) -> tuple[int, int]:
    """Return the first address and the one behind the last."""
    start = int(subnet.network_address)
    return start, start + (1 << subnet.max_prefixlen - subnet.prefixlen)
