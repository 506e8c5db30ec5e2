"""What we believe about the other nodes: etcd's snapshot and events in, route changes out.

Does no I/O. One entry per key. Each bad key or value is logged once, counted and skipped, the
route that was there stays; a conflicting lease is quarantined, never fatal. Routes are compared by
value, so a renewal that changes nothing programs nothing. Source: spec section 6, decisions 10-17.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from ipaddress import IPv4Address, IPv4Network

from pyflannel.control.lease import (
    BACKEND_TYPE,
    BadLease,
    KeyValue,
    Lease,
    parse_lease_untrusted,
)
from pyflannel.dataplane.route import Delete, IPNetwork, MacAddress, Replace, Route, RouteChange

log = logging.getLogger(__name__)

UNCONFIRMED_SECONDS = 86400.0
"""How long a peer stays in use that a wiped or rolled-back store does not name."""


class LeaseTable:
    """The leases of all other nodes and the routes that follow from them."""

    def __init__(self, own_public_ip: IPv4Address, network: IPv4Network, port: int) -> None:
        self._own_public_ip = own_public_ip
        self._network = network
        self._port = port
        self._own_subnet: IPv4Network | None = None
        self._leases: dict[bytes, Lease] = {}
        self._previous_mac: dict[bytes, MacAddress] = {}
        self._bad: dict[bytes, str] = {}
        self._quarantined: dict[bytes, str] = {}
        self._unconfirmed: dict[bytes, float] = {}
        self._routes: dict[IPNetwork, Route] = {}
        self._claims = _Claims()

    def set_own_subnet(self, subnet: IPv4Network | None) -> tuple[RouteChange, ...]:
        """Say which lease is ours; it and what overlaps it gets no route."""
        self._own_subnet = subnet
        return self._settle()

    def put(self, kv: KeyValue) -> tuple[RouteChange, ...]:
        """Take in a put event."""
        known = kv.key in self._leases
        self._unconfirmed.pop(kv.key, None)
        if not self._store(kv):
            return ()
        lease = self._leases[kv.key]
        if self._quarantined or self._is_own(lease) or self._why_unusable(lease):
            return self._settle()
        # Without conflicts the other routes stand; a new lease is the youngest, so it loses alone.
        if not known and self._claims.claim(lease.subnet.ipv4, kv.key):
            return self._settle()
        old, new = self._routes.pop(lease.subnet.ipv4, None), self._route(kv.key, lease)
        if new is None:
            return (Delete(old.subnet),) if old is not None else ()
        self._routes[new.subnet] = new
        return (Replace(new),) if new != old else ()

    def delete(self, key: bytes) -> tuple[RouteChange, ...]:
        """Take in a delete event; an unknown key is fine."""
        self._bad.pop(key, None)
        lease = self._leases.get(key)
        if lease is None:
            return ()
        self._forget(key)
        if self._quarantined or self._is_own(lease):
            return self._settle()
        self._claims.release(lease.subnet.ipv4)
        gone = self._routes.pop(lease.subnet.ipv4, None)
        return (Delete(gone.subnet),) if gone is not None else ()

    def reset(
        self, kvs: Iterable[KeyValue], *, same_history: bool = True, now: float = 0.0
    ) -> tuple[RouteChange, ...]:
        """Take in a snapshot; `now` in seconds of the clock that `expire` is given.

        Leases that are missing from it go, unless the store is not the one we knew
        (`same_history` false: wiped or rolled back): then they stay, unconfirmed, until they are
        put again, a lease overlaps them, or `UNCONFIRMED_SECONDS` have passed (decision 17).
        """
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
            log.warning("lease %s was not confirmed in a day: removed", _text(key))
            self._forget(key)
        return self._settle() if due else ()

    def routes(self) -> tuple[Route, ...]:
        """Return the routes to all peers in use."""
        return tuple(self._routes.values())

    def leases(self) -> tuple[Lease, ...]:
        """Return all leases that could be read, quarantined ones included."""
        return tuple(self._leases.values())

    def quarantined(self) -> Mapping[str, str]:
        """Return the reason by key for leases that are not used."""
        return {_text(key): why for key, why in self._quarantined.items()}

    def bad(self) -> Mapping[str, str]:
        """Return the reason by key for what is no lease."""
        return {_text(key): why for key, why in self._bad.items()}

    def unconfirmed(self) -> Mapping[str, float]:
        """Return the time by key until which peers are kept that etcd lost."""
        return {_text(key): end for key, end in self._unconfirmed.items()}

    def _forget(self, key: bytes) -> None:
        del self._leases[key]
        self._previous_mac.pop(key, None)
        self._unconfirmed.pop(key, None)

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
        if old is None:
            return True
        was, now = old.attributes.vtep, lease.attributes.vtep
        if was is not None and (now is None or now.mac != was.mac):
            self._previous_mac[kv.key] = was.mac
        return old.attributes != lease.attributes or old.create_revision != lease.create_revision

    def _note_bad(self, key: bytes, why: str) -> None:
        if self._bad.get(key) != why:
            kept = "; the last good value stays in use" if key in self._leases else ""
            log.warning("skipping %s: %s%s", _text(key), why, kept)
        self._bad[key] = why

    def _settle(self) -> tuple[RouteChange, ...]:
        """Derive the routes anew and return what differs."""
        wanted: dict[IPNetwork, Route] = {}
        quarantined: dict[bytes, str] = {}
        self._claims = _Claims()
        # Revisions of a lost history say nothing about age: what etcd names now comes first.
        for key, lease in sorted(
            self._leases.items(),
            key=lambda item: (item[0] in self._unconfirmed, item[1].create_revision, item[0]),
        ):
            if self._is_own(lease):
                continue
            why = self._why_unusable(lease) or self._claims.claim(lease.subnet.ipv4, key)
            if why and key in self._unconfirmed:
                log.warning("lease %s is not confirmed and %s: removed", _text(key), why)
                self._forget(key)
                continue
            if why:
                quarantined[key] = why
                continue
            route = self._route(key, lease)
            if route is not None:
                wanted[route.subnet] = route
        for key, why in quarantined.items():
            if self._quarantined.get(key) != why:
                log.warning("not using lease %s: %s", _text(key), why)
        self._quarantined = quarantined
        changes: list[RouteChange] = [Delete(x) for x in self._routes if x not in wanted]
        changes += [Replace(x) for x in wanted.values() if self._routes.get(x.subnet) != x]
        self._routes = wanted
        return tuple(changes)

    def _route(self, key: bytes, lease: Lease) -> Route | None:
        """Return the route to a peer, None until it has published a MAC."""
        vtep = lease.attributes.vtep
        if vtep is None:
            return None
        return Route(
            subnet=lease.subnet.ipv4,
            vtep_mac=vtep.mac,
            underlay=lease.attributes.public_ip,
            port=self._port,
            previous_mac=self._previous_mac.get(key),
        )

    def _is_own(self, lease: Lease) -> bool:
        return (
            lease.subnet.ipv4 == self._own_subnet
            and lease.attributes.public_ip == self._own_public_ip
        )

    def _why_unusable(self, lease: Lease) -> str | None:
        address, subnet = lease.attributes.public_ip, lease.subnet.ipv4
        if lease.attributes.backend_type != BACKEND_TYPE:
            return f"its BackendType is {lease.attributes.backend_type!r}, not {BACKEND_TYPE!r}"
        if address == self._own_public_ip:
            return (
                f"its PublicIP {address} is our own; another host uses the same address, or it is "
                "an old lease of ours"
            )
        if address.is_unspecified or address.is_loopback or address.is_multicast:
            return f"its PublicIP {address} cannot be a host's"
        if address in self._network:
            return f"its PublicIP {address} lies inside the overlay network {self._network}"
        if not subnet.subnet_of(self._network):
            return f"its subnet is not inside the network {self._network}"
        if self._own_subnet is not None and subnet.overlaps(self._own_subnet):
            return f"its subnet overlaps our own {self._own_subnet}"
        return None


class _Claims:
    """Which lease holds which subnet; finds an overlap in as many look-ups as a prefix has bits."""

    def __init__(self) -> None:
        self._holder: dict[tuple[int, int], bytes] = {}
        self._inside: dict[tuple[int, int], int] = {}

    def claim(self, subnet: IPv4Network, key: bytes) -> str | None:
        """Take the subnet, or return why it cannot be had."""
        prefixes = _prefixes(subnet)
        for prefix in prefixes:
            if prefix in self._holder:
                return f"its subnet overlaps that of the older lease {_text(self._holder[prefix])}"
        if prefixes[0] in self._inside:
            return "its subnet holds that of an older lease"
        self._holder[prefixes[0]] = key
        for prefix in prefixes:
            self._inside[prefix] = self._inside.get(prefix, 0) + 1
        return None

    def release(self, subnet: IPv4Network) -> None:
        """Give back a claimed subnet."""
        prefixes = _prefixes(subnet)
        del self._holder[prefixes[0]]
        for prefix in prefixes:
            self._inside[prefix] -= 1
            if not self._inside[prefix]:
                del self._inside[prefix]


def _prefixes(subnet: IPv4Network) -> list[tuple[int, int]]:
    """Return (length, leading bits) of a subnet and of every network around it."""
    base = int(subnet.network_address)
    return [(length, base >> 32 - length) for length in range(subnet.prefixlen, -1, -1)]


def _text(key: bytes) -> str:
    return key.decode("utf-8", "backslashreplace")
