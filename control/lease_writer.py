"""Acquires our lease and writes it, always by compare-and-swap.

It knows what we write and which subnet to ask for, not what becomes of the lease afterwards.
Source: spec section 5.2.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

from pyflannel.control.etcd import Etcd, Snapshot
from pyflannel.control.etcd_fault import EtcdHeld, EtcdRejected, EtcdUnavailable
from pyflannel.control.lease import (
    BACKEND_TYPE,
    LEASE_TTL_SECONDS,
    BadLease,
    KeyValue,
    Lease,
    LeaseAttributes,
    LeaseSubnet,
    Vtep,
    lease_key,
    may_be_of,
    parse_lease_attributes_untrusted,
    parse_lease_untrusted,
    parse_subnet_key_untrusted,
)
from pyflannel.control.lease_list import RecentSnapshot
from pyflannel.control.network_config import NetworkConfig
from pyflannel.control.subnet_pool import choose_subnet
from pyflannel.dataplane.route import IPAddress, MacAddress, Vni

log = logging.getLogger(__name__)

RETRY_SECONDS = 1.0
RACE_SECONDS = 0.05
GRANTS_REMEMBERED = 16


@dataclass(frozen=True, slots=True)
class OwnIdentity:
    """Who we are to the others, and the subnet that we had in our last run.

    The IPv6 fields are None unless the network is dual stack.
    """

    public_ip: IPv4Address
    vtep_mac: MacAddress
    previous: LeaseSubnet | None = None
    public_ipv6: IPv6Address | None = None
    vtep_mac_v6: MacAddress | None = None

    @classmethod
    def of(
        cls,
        public_ips: Sequence[IPAddress],
        macs: Sequence[MacAddress],
        previous: LeaseSubnet | None,
    ) -> OwnIdentity:
        """Make one of an address and a MAC for each family, IPv4 first."""
        ipv4, ipv6 = public_ips[0], public_ips[1] if len(public_ips) > 1 else None
        assert isinstance(ipv4, IPv4Address) and (ipv6 is None or isinstance(ipv6, IPv6Address))
        return cls(ipv4, macs[0], previous, ipv6, macs[1] if len(macs) > 1 else None)

    @property
    def macs(self) -> tuple[MacAddress, ...]:
        """The VTEP MAC of each family, IPv4 first."""
        return (self.vtep_mac,) if self.vtep_mac_v6 is None else (self.vtep_mac, self.vtep_mac_v6)

    def attributes(self, vni: Vni) -> LeaseAttributes:
        """Return what our lease says about us."""
        mac_v6 = self.vtep_mac_v6
        return LeaseAttributes(
            self.public_ip,
            self.public_ipv6,
            BACKEND_TYPE,
            Vtep(self.vtep_mac, vni),
            None if mac_v6 is None else Vtep(mac_v6, vni),
        )


class LeaseWriter:
    """Writes the lease of one host."""

    def __init__(
        self,
        etcd: Etcd,
        prefix: str,
        config: NetworkConfig,
        identity: OwnIdentity,
        rng: random.Random,
    ) -> None:
        self._etcd = etcd
        self._prefix = prefix
        self._config = config
        self._previous = identity.previous
        self._rng = rng
        self.identify(identity)
        self.granted: deque[int] = deque(maxlen=GRANTS_REMEMBERED)
        """The etcd leases made here, the latest last."""

    def identify(self, identity: OwnIdentity) -> None:
        """Write for this identity from now on."""
        self._identity = identity
        self.value = identity.attributes(self._config.backend.vni).to_json()

    async def acquire(
        self, recent: RecentSnapshot | None, on_rejected: Callable[[EtcdRejected], None]
    ) -> Lease:
        """Get a lease: our old one, the previous subnet, or a free one.

        `recent` may spare the first attempt a list, `on_rejected` is told when etcd says no. Waits
        for etcd as long as it takes, and tries again when another host was faster: then there is
        one subnet less, so this ends. SubnetsExhausted when there is none.
        """
        recent = recent or RecentSnapshot(self._etcd, self._prefix)
        while True:
            try:
                lease = await self._attempt(await recent.read())
                if lease is not None:
                    return lease
                await asyncio.sleep(RACE_SECONDS * self._rng.random())
            except EtcdRejected as error:
                on_rejected(error)
                await asyncio.sleep(RETRY_SECONDS)
            except EtcdUnavailable as error:
                log.debug("cannot acquire a lease: %s", error)
            recent.forget()

    async def _attempt(self, snapshot: Snapshot) -> Lease | None:
        """Try once; None when somebody else was faster."""
        taken = []
        for kv in snapshot.kvs:
            with contextlib.suppress(BadLease, UnicodeDecodeError):
                taken.append(parse_subnet_key_untrusted(kv.key.decode()))
            lease = self._own_lease(kv)
            if lease is None:
                continue
            if self._config.fits(lease.subnet):
                return await self._reuse(lease)
            self._previous = lease.subnet
            if (await self._etcd.delete_if(kv.key.decode(), kv.mod_revision)).succeeded:
                log.warning("our lease %s does not fit the network config: deleted", lease.subnet)
            return None
        return await self._create(choose_subnet(self._config, taken, self._rng, self._previous))

    def _own_lease(self, kv: KeyValue) -> Lease | None:
        if not may_be_of(kv, self._identity.public_ip):
            return None
        try:
            lease = parse_lease_untrusted(kv)
        except BadLease:
            return None
        return lease if lease.attributes.public_ip == self._identity.public_ip else None

    async def _reuse(self, lease: Lease) -> Lease | None:
        written = await self.write(lease.subnet, lease, reservation=lease.etcd_lease == 0)
        if written is None:
            return None
        vtep = lease.attributes.vtep
        if vtep is not None and vtep.mac != self._identity.vtep_mac:
            log.warning(
                "lease %s of our public IP %s had VTEP MAC %s, not our %s: taken over; if another "
                "host uses this address, give each its own --public-ip",
                lease.subnet,
                self._identity.public_ip,
                vtep.mac,
                self._identity.vtep_mac,
            )
        log.info(
            "Found lease (%s) for current IP (%s), reusing",
            lease.subnet.ipv4,
            self._identity.public_ip,
        )
        return written

    async def _create(self, subnet: LeaseSubnet) -> Lease | None:
        lease = await self.write(subnet, None, reservation=False)
        if lease is None:
            log.info("lost the race for %s, trying another", subnet.ipv4)
            return None
        if self._previous is not None and subnet.ipv4 == self._previous.ipv4:
            log.info("Found previously leased subnet (%s), reusing", subnet.ipv4)
        else:
            for subnets in self._config.ranges:
                log.info("Picking subnet in range %s ... %s", subnets.first, subnets.last)
        log.info("Allocated lease (%s) to current node", subnet.ipv4)
        return lease

    async def write(
        self, subnet: LeaseSubnet, over: Lease | KeyValue | None, *, reservation: bool
    ) -> Lease | None:
        """Put our value over what was read, or where nothing was; None if that changed since."""
        expected, created = (over.mod_revision, over.create_revision) if over else (0, 0)
        granted = 0 if reservation else await self._etcd.grant(LEASE_TTL_SECONDS)
        if granted:
            self.granted.append(granted)
        key = lease_key(self._prefix, subnet)
        try:
            commit = await self._etcd.put_if(key, self.value, granted, expected)
        except EtcdHeld:
            # As after no answer at all the put may be done yet, so the grant ends by itself.
            raise
        except EtcdRejected:
            await self._revoke(granted)
            raise
        written = commit.revision
        if not commit.succeeded:
            current = commit.current
            # An answer that got lost: the write that is there is the one we just made. A
            # reservation of this value can be another host's, so it is written once more.
            if (
                current is None
                or not granted
                or (current.lease, current.value) != (granted, self.value)
            ):
                await self._revoke(granted)
                return None
            written, created = current.mod_revision, current.create_revision
        return Lease(
            subnet,
            parse_lease_attributes_untrusted(self.value),
            create_revision=created or written,
            mod_revision=written,
            etcd_lease=granted,
        )

    async def _revoke(self, granted: int) -> None:
        if granted:
            with contextlib.suppress(EtcdUnavailable):
                await self._etcd.revoke(granted)
