"""What we believe about the other nodes: etcd's snapshot and events in, route changes out.

Does no I/O. One entry per key, a `FamilyRoutes` for each address family. Each bad key or value is
logged once, counted and skipped, the route that was there stays; a conflicting lease is
quarantined, never fatal. Routes are compared by value, so a renewal that changes nothing programs
nothing. Source: spec section 6, decisions 10-17.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set

from pyflannel.control.family_routes import FamilyRoutes, Place
from pyflannel.control.lease import (
    BACKEND_TYPE,
    BadLease,
    KeyValue,
    Lease,
    LeaseSubnet,
    parse_lease_untrusted,
    text_of,
)
from pyflannel.dataplane.route import IPAddress, IPNetwork, Route, RouteChange

log = logging.getLogger(__name__)

PART_LEASES = 500
UNCONFIRMED_SECONDS = 86400.0
"""How long a peer stays in use that a wiped or rolled-back store does not name."""


class LeaseTable:
    """The leases of all other nodes and the routes that follow from them."""

    def __init__(self, places: Sequence[Place], port: int) -> None:
        """Make an empty table; `places` has one entry for each family, IPv4 first."""
        self._own_public_ips = {place.public_ip for place in places}
        self._families = [FamilyRoutes(place, port) for place in places]
        self._own_subnet: LeaseSubnet | None = None
        self._leases: dict[bytes, Lease] = {}
        self._bad: dict[bytes, str] = {}
        self._quarantined: dict[bytes, str] = {}
        self._rivals: Set[bytes] = set()
        """Those of them that would hold a subnet if another did not."""
        self._unconfirmed: dict[bytes, float] = {}
        self._newest = 0
        """The highest create_revision that came in this history of the store."""

    def set_own_subnet(self, subnet: LeaseSubnet | None) -> tuple[RouteChange, ...]:
        """Say which lease is ours; it and what overlaps it gets no route."""
        self._own_subnet = subnet
        parts = {} if subnet is None else {part.version: part for part in subnet.parts}
        for family in self._families:
            family.own_subnet = parts.get(family.version)
        return self._settle()

    def set_own_public_ip(self, public_ip: IPAddress) -> tuple[RouteChange, ...]:
        """Say what we advertise in its family from now on; our lease may lag behind."""
        self._own_public_ips.add(public_ip)
        for family in self._families:
            if family.version == public_ip.version:
                family.own_public_ip = public_ip
        return self._settle()

    def take(self, events: Iterable[tuple[bytes, KeyValue | None]]) -> tuple[RouteChange, ...]:
        """Take in events in order, None for a deletion; conflicts are settled once, at the end."""
        changes: list[RouteChange] = []
        is_settled = True
        for key, kv in events:
            found = self._delete(key, is_settled) if kv is None else self._put(kv, is_settled)
            if found is None:
                is_settled = False
            else:
                changes += found
        return tuple(changes) if is_settled else (*changes, *self._settle())

    def put(self, kv: KeyValue) -> tuple[RouteChange, ...]:
        """Take in a put event."""
        return self.take([(kv.key, kv)])

    def delete(self, key: bytes) -> tuple[RouteChange, ...]:
        """Take in a delete event; an unknown key is fine."""
        return self.take([(key, None)])

    def _put(self, kv: KeyValue, is_settled: bool) -> tuple[RouteChange, ...] | None:
        """Store one entry and return what follows; None if only `_settle` can tell."""
        known, newest = kv.key in self._leases, self._newest
        self._unconfirmed.pop(kv.key, None)
        if not self._store(kv):
            return ()
        if not is_settled:
            return None
        lease = self._leases[kv.key]
        if not known:
            if lease.create_revision <= newest or self._unconfirmed:
                return None
            changes, foreign = self._append([(kv.key, lease)])
            self._quarantine({**self._foreign(), **foreign})
            return changes
        if self._is_own(lease) or _is_foreign(lease) or self._is_disputed(kv.key, lease):
            return None
        if not all(x.can_use(lease) for x in self._families):
            return None
        return tuple(change for x in self._families for change in x.update(kv.key, lease))

    def _delete(self, key: bytes, is_settled: bool) -> tuple[RouteChange, ...] | None:
        """Forget one entry and return what follows; None if only `_settle` can tell."""
        self._bad.pop(key, None)
        lease = self._leases.get(key)
        if lease is None:
            return ()
        is_disputed = is_settled and self._is_disputed(key, lease)
        self._forget(key)
        if not is_settled or is_disputed or self._is_own(lease):
            return None
        return tuple(change for x in self._families for change in x.remove(lease))

    def load(self, kvs: Iterable[KeyValue]) -> Iterator[tuple[RouteChange, ...]]:
        """Take the first snapshot into an empty table, in parts, so that routes are soon there.

        The oldest leases come first, as they win where leases conflict: no later part takes back
        what an earlier one brought.
        """
        oldest_first = sorted(kvs, key=lambda kv: (kv.create_revision, kv.key))
        foreign: dict[bytes, str] = {}
        for start in range(0, len(oldest_first), PART_LEASES):
            part = oldest_first[start : start + PART_LEASES]
            leases = [(kv.key, self._leases[kv.key]) for kv in part if self._store(kv)]
            changes, others = self._append(leases)
            foreign |= others
            yield changes
        self._quarantine(foreign)

    def _append(
        self, leases: Iterable[tuple[bytes, Lease]]
    ) -> tuple[tuple[RouteChange, ...], dict[bytes, str]]:
        """Take in leases that are younger than all others, so that they change nothing of those."""
        peers, foreign = self._peers(leases)
        return tuple(change for x in self._families for change in x.load(peers)), foreign

    def reset(
        self, kvs: Iterable[KeyValue], *, same_history: bool = True, now: float = 0.0
    ) -> tuple[RouteChange, ...]:
        """Take in a snapshot; `now` in seconds of the clock that `expire` is given.

        Leases that are missing from it go, unless the store is not the one we knew
        (`same_history` false: wiped or rolled back): then they stay, unconfirmed, until they are
        put again, a lease overlaps them, or `UNCONFIRMED_SECONDS` have passed (decision 17).
        """
        if not same_history:
            self._newest = 0
        present = set()
        for kv in kvs:
            present.add(kv.key)
            self._unconfirmed.pop(kv.key, None)
            self._store(kv)
        for key in self._bad.keys() - present:
            del self._bad[key]
        for key in self._leases.keys() - present - self._unconfirmed.keys():
            if same_history or self._is_own(self._leases[key]):
                self._forget(key)
            else:
                self._unconfirmed[key] = now + UNCONFIRMED_SECONDS
        return self._settle()

    def expire(self, now: float) -> tuple[RouteChange, ...]:
        """Let go of peers that stayed unconfirmed for too long."""
        due = [key for key, end in self._unconfirmed.items() if end <= now]
        for key in due:
            log.warning("lease %s was not confirmed in a day: removed", text_of(key))
            self._forget(key)
        return self._settle() if due else ()

    def beyond_etcd(self, now: float) -> tuple[tuple[KeyValue, float | None], ...]:
        """Return the leases that etcd does not tell a newcomer, for a successor.

        Each with the seconds for which it is kept, None if its key is there with a bad value.
        """
        ends: dict[bytes, float | None] = {key: end - now for key, end in self._unconfirmed.items()}
        ends |= dict.fromkeys(self._bad.keys() & self._leases.keys())
        return tuple((self._leases[key].entry(key), end) for key, end in ends.items())

    def keep(
        self, entries: Iterable[tuple[KeyValue, float | None]], now: float
    ) -> tuple[RouteChange, ...]:
        """Go on with what `beyond_etcd` returned where etcd has not told more by now."""
        for kv, seconds in entries:
            if kv.key in self._leases or (seconds is None and kv.key not in self._bad):
                continue
            try:
                self._leases[kv.key] = parse_lease_untrusted(kv)
            except BadLease:  # another version may know forms that we do not
                continue
            if seconds is not None:
                self._unconfirmed[kv.key] = now + seconds
        return self._settle()

    def routes(self) -> tuple[Route, ...]:
        """Return the routes to all peers in use."""
        return tuple(route for x in self._families for route in x.routes.values())

    def has_route(self, subnet: IPNetwork) -> bool:
        """Whether a peer in use has exactly this subnet."""
        return any(subnet in family.routes for family in self._families)

    def leases(self) -> tuple[Lease, ...]:
        """Return all leases that could be read, quarantined ones included."""
        return tuple(self._leases.values())

    def quarantined(self) -> Mapping[str, str]:
        """Return the reason by key for leases that are not used."""
        return {text_of(key): why for key, why in self._quarantined.items()}

    def bad(self) -> Mapping[str, str]:
        """Return the reason by key for what is no lease."""
        return {text_of(key): why for key, why in self._bad.items()}

    def unconfirmed(self) -> Mapping[str, float]:
        """Return the time by key until which peers are kept that etcd lost."""
        return {text_of(key): end for key, end in self._unconfirmed.items()}

    def _forget(self, key: bytes) -> None:
        del self._leases[key]
        self._unconfirmed.pop(key, None)
        for family in self._families:
            family.forget(key)

    def _store(self, kv: KeyValue) -> bool:
        """Parse one entry; return whether it changes what is stored."""
        try:
            lease = parse_lease_untrusted(kv)
        except BadLease as error:
            self._note_bad(kv.key, str(error))
            return False
        self._bad.pop(kv.key, None)
        old = self._leases.get(kv.key)
        self._leases[kv.key] = lease
        self._newest = max(self._newest, lease.create_revision)
        if old is None:
            return True
        for family in self._families:
            family.note_change(kv.key, old, lease)
        return old.attributes != lease.attributes or old.create_revision != lease.create_revision

    def _note_bad(self, key: bytes, why: str) -> None:
        if self._bad.get(key) != why:
            kept = "; the last good value stays in use" if key in self._leases else ""
            log.warning("skipping %.300s: %s%s", text_of(key), why, kept)
        self._bad[key] = why

    def _settle(self) -> tuple[RouteChange, ...]:
        """Derive the routes anew and return what differs."""
        # Revisions of a lost history say nothing about age: what etcd names now comes first.
        oldest_first = sorted(
            self._leases.items(),
            key=lambda item: (item[0] in self._unconfirmed, item[1].create_revision, item[0]),
        )
        peers, foreign = self._peers(oldest_first)
        changes = [change for x in self._families for change in x.settle(peers)]
        if self._quarantine(foreign):
            # What such a lease held in its other family is free now.
            changes += self._settle()
        return tuple(changes)

    def _quarantine(self, foreign: Mapping[bytes, str]) -> bool:
        """Note which leases are not used; whether some of them went, as none but us kept them."""
        quarantined = dict(foreign)
        for family in self._families:
            for key, why in family.quarantined.items():
                quarantined[key] = f"{quarantined[key]}; {why}" if key in quarantined else why
        unconfirmed = quarantined.keys() & self._unconfirmed.keys()
        for key in unconfirmed:
            log.warning(
                "lease %s is not confirmed and %s: removed", text_of(key), quarantined.pop(key)
            )
            self._forget(key)
        if unconfirmed:
            return True
        for key, why in quarantined.items():
            if self._quarantined.get(key) != why:
                log.warning("not using lease %s: %s", text_of(key), why)
        self._quarantined = quarantined
        self._rivals = quarantined.keys() - foreign.keys()
        return False

    def _peers(
        self, leases: Iterable[tuple[bytes, Lease]]
    ) -> tuple[list[tuple[bytes, Lease]], dict[bytes, str]]:
        """Return the leases of other nodes among these, and why some are none of peers."""
        peers, foreign = [], {}
        for key, lease in leases:
            if self._is_own(lease):
                continue
            if _is_foreign(lease):
                kind = lease.attributes.backend_type
                foreign[key] = f"its BackendType is {kind!r:.80}, not {BACKEND_TYPE!r}"
            else:
                peers.append((key, lease))
        return peers, foreign

    def _foreign(self) -> dict[bytes, str]:
        """Return why leases are not used that no family was asked about."""
        return {x: why for x, why in self._quarantined.items() if x not in self._rivals}

    def _is_disputed(self, key: bytes, lease: Lease) -> bool:
        """Whether a change of this lease may concern one that is not used, or is that of one."""
        return key in self._quarantined or any(
            lease.subnet.overlaps(self._leases[x].subnet) for x in self._rivals
        )

    def _is_own(self, lease: Lease) -> bool:
        return (
            self._own_subnet is not None
            and lease.subnet.ipv4 == self._own_subnet.ipv4
            and lease.attributes.public_ip in self._own_public_ips
        )


def _is_foreign(lease: Lease) -> bool:
    return lease.attributes.backend_type != BACKEND_TYPE
