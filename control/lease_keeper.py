"""Our own lease: acquire it, renew it, notice its loss and get it back.

It writes only with compare-and-swap, so it can never take a subnet that somebody else got
meanwhile, and it never fights: a foreign write to our key is reported and makes us unready. A
lease without an etcd lease is a reservation: it is kept so and needs no renewal.
Source: spec section 5, decisions 14, 15.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Protocol

from pyflannel.control.etcd import (
    Compacted,
    Deleted,
    Etcd,
    EtcdUnavailable,
    Snapshot,
)
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
    parse_lease_attributes_untrusted,
    parse_lease_untrusted,
    parse_subnet_key_untrusted,
    subnets_prefix,
)
from pyflannel.control.network_config import NetworkConfig
from pyflannel.control.subnet_pool import choose_subnet, is_compatible
from pyflannel.dataplane.refusal import Refusal
from pyflannel.dataplane.route import MacAddress

log = logging.getLogger(__name__)

ATTEMPTS = 10
RETRY_SECONDS = 1.0
RENEW_RETRY_SECONDS = 60.0
RENEW_JITTER = 0.05
"""Share of the margin by which renewals are spread, so that a cluster does not renew at once."""

CONFLICT = "duplicate-public-ip"


class Readiness(Protocol):
    """Where reasons for not being ready go."""

    def set(self, reason: str, sentence: str) -> None:
        """Become unready."""

    def clear(self, reason: str) -> None:
        """Take a reason back."""


@dataclass(frozen=True, slots=True)
class OwnIdentity:
    """Who we are to the others, and the subnet that we had in our last run."""

    public_ip: IPv4Address
    vtep_mac: MacAddress
    previous: LeaseSubnet | None = None


class LeaseKeeper:
    """Keeps one lease for one host."""

    def __init__(
        self,
        etcd: Etcd,
        prefix: str,
        config: NetworkConfig,
        identity: OwnIdentity,
        renew_margin_seconds: float,
        rng: random.Random,
        readiness: Readiness,
    ) -> None:
        self._etcd = etcd
        self._prefix = prefix
        self._config = config
        self._identity = identity
        self._margin = renew_margin_seconds
        self._rng = rng
        self._readiness = readiness
        self._foreign_puts = 0
        self._lease: Lease | None = None
        self.expires_at: float | None = None
        """Wall clock in seconds; None for a reservation."""

    @property
    def _value(self) -> bytes:
        vtep = Vtep(self._identity.vtep_mac, self._config.backend.vni)
        return LeaseAttributes(self._identity.public_ip, None, BACKEND_TYPE, vtep).to_json()

    async def acquire(self) -> Lease:
        """Get a lease: our old one, the previous subnet, or a free one.

        Waits for etcd as long as it takes. SubnetsExhausted when there is none, Refusal when
        others win every race.
        """
        lost = 0
        told = 0.0
        while lost < ATTEMPTS:
            try:
                lease = await self._attempt(await self._etcd.snapshot(subnets_prefix(self._prefix)))
            except EtcdUnavailable as error:
                if time.monotonic() - told > 60 or not told:
                    log.warning("cannot acquire a lease: %s; trying again", error)
                    told = time.monotonic()
                await asyncio.sleep(RETRY_SECONDS)
                continue
            if lease is not None:
                return lease
            lost += 1
        raise Refusal(
            f"another host was faster {ATTEMPTS} times in a row in {self._prefix}; start again"
        )

    async def _attempt(self, snapshot: Snapshot) -> Lease | None:
        """Try once; None when somebody else was faster."""
        taken = []
        for kv in snapshot.kvs:
            with contextlib.suppress(BadLease, UnicodeDecodeError):
                taken.append(parse_subnet_key_untrusted(kv.key.decode()).ipv4)
            lease = self._own_lease(kv)
            if lease is None:
                continue
            if is_compatible(self._config, lease.subnet):
                return await self._reuse(lease)
            log.warning("our lease %s does not fit the network config: deleted", lease.subnet)
            await self._etcd.delete_if(kv.key.decode(), kv.mod_revision)
            return None
        previous = self._identity.previous
        if previous is not None and not any(previous.ipv4.overlaps(x) for x in taken):
            if is_compatible(self._config, previous):
                log.info("Found previously leased subnet (%s), reusing", previous.ipv4)
                return await self._create(previous)
            log.warning("previous subnet %s does not fit the network config", previous.ipv4)
        log.info(
            "Picking subnet in range %s ... %s", self._config.subnet_min, self._config.subnet_max
        )
        return await self._create(LeaseSubnet(choose_subnet(self._config, taken, self._rng)))

    def _own_lease(self, kv: KeyValue) -> Lease | None:
        try:
            lease = parse_lease_untrusted(kv)
        except BadLease:
            return None
        return lease if lease.attributes.public_ip == self._identity.public_ip else None

    async def _reuse(self, lease: Lease) -> Lease | None:
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
        return await self._write(lease.subnet, lease.mod_revision, lease.etcd_lease == 0)

    async def _create(self, subnet: LeaseSubnet) -> Lease | None:
        lease = await self._write(subnet, 0, reservation=False)
        if lease is None:
            log.info("lost the race for %s, trying another", subnet.ipv4)
        else:
            log.info("Allocated lease (%s) to current node", subnet.ipv4)
        return lease

    async def _write(
        self, subnet: LeaseSubnet, mod_revision: int, reservation: bool
    ) -> Lease | None:
        """Compare-and-swap our value in; None if the key is not as expected any more."""
        granted = 0 if reservation else await self._etcd.grant(LEASE_TTL_SECONDS)
        key = lease_key(self._prefix, subnet)
        try:
            commit = await self._etcd.put_if(key, self._value, granted, mod_revision)
        except BaseException:
            await self._give_back(granted)
            raise
        written = commit.revision if commit.succeeded else 0
        if not commit.succeeded:
            current = commit.current
            # An answer that got lost: the write that is there is the one we just made.
            if current is None or current.lease != granted or current.value != self._value:
                await self._give_back(granted)
                return None
            written = current.mod_revision
        self.expires_at = None if reservation else time.time() + LEASE_TTL_SECONDS
        self._lease = Lease(
            subnet,
            parse_lease_attributes_untrusted(self._value),
            create_revision=0,
            mod_revision=written,
            etcd_lease=granted,
        )
        return self._lease

    async def _give_back(self, granted: int) -> None:
        if granted:
            with contextlib.suppress(EtcdUnavailable):
                await self._etcd.revoke(granted)

    async def run(self, on_change: Callable[[Lease], Awaitable[None]]) -> None:
        """Renew and watch for ever; `on_change` gets a lease of another subnet."""
        renewing = asyncio.ensure_future(self._renew_for_ever())
        try:
            await self._watch_for_ever(on_change)
        finally:
            renewing.cancel()
            await asyncio.gather(renewing, return_exceptions=True)

    async def _renew_for_ever(self) -> None:
        while True:
            if self.expires_at is None:
                await asyncio.sleep(RENEW_RETRY_SECONDS)
                continue
            spread = self._margin * RENEW_JITTER * self._rng.random()
            delay = self.expires_at - self._margin - spread - time.time()
            if delay > 0:
                # Wall clock: a suspended host must not sleep through the end of its lease.
                await asyncio.sleep(min(delay, RENEW_RETRY_SECONDS))
                continue
            if not await self._renew():
                await asyncio.sleep(RENEW_RETRY_SECONDS)

    async def _renew(self) -> bool:
        """Put the same value under a new etcd lease; whether that is done."""
        lease = self._lease
        assert lease is not None
        try:
            if await self._write(lease.subnet, lease.mod_revision, reservation=False) is None:
                log.warning("lease %s was changed by somebody else: not renewed", lease.subnet)
                return False
        except EtcdUnavailable as error:
            log.error("cannot renew lease %s: %s", lease.subnet, error)
            return False
        assert self.expires_at is not None
        when = time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(self.expires_at))
        log.info("Lease renewed, new expiration: %s", when)
        return True

    async def _watch_for_ever(self, on_change: Callable[[Lease], Awaitable[None]]) -> None:
        """Follow our own key, exactly; any error ends in reading it anew."""
        failing = False
        while True:
            assert self._lease is not None
            key = lease_key(self._prefix, self._lease.subnet)
            try:
                reading = await self._etcd.get(key)
                if failing:
                    log.info("watching our own lease again")
                failing = False
                if reading.kv is None:
                    await self._recover(on_change)
                    continue
                self._look_at(reading.kv)
                async for batch in self._etcd.watch(
                    key, prefix=False, from_revision=reading.revision + 1
                ):
                    for event in batch.events:
                        if not isinstance(event, Deleted):
                            self._look_at(event.kv)
                    if batch.events and isinstance(batch.events[-1], Deleted):
                        await self._recover(on_change)
                        break
            except Compacted:
                continue
            except EtcdUnavailable as error:
                if not failing:
                    log.warning("cannot watch our own lease: %s; trying again", error)
                failing = True
                await asyncio.sleep(RETRY_SECONDS * (0.5 + self._rng.random()))

    def _look_at(self, kv: KeyValue) -> None:
        """Tell our own writes to our key from foreign ones."""
        lease = self._lease
        assert lease is not None
        if kv.mod_revision <= lease.mod_revision or (
            kv.lease == lease.etcd_lease and kv.value == self._value
        ):
            return
        self._foreign_puts += 1
        key = kv.key.decode("utf-8", "replace")
        if kv.value == self._value and self._foreign_puts == 1:
            log.warning("somebody else wrote our own value to %s", key)
            self._lease = Lease(
                lease.subnet, lease.attributes, kv.create_revision, kv.mod_revision, kv.lease
            )
            return
        self._readiness.set(
            CONFLICT,
            f"somebody else wrote to our lease {key}: "
            f"{kv.value[:200].decode('utf-8', 'replace')}; another host uses our public IP "
            f"{self._identity.public_ip}, give each its own --public-ip and restart",
        )

    async def _recover(self, on_change: Callable[[Lease], Awaitable[None]]) -> None:
        """Our key is gone: take the same subnet if it is free, else another."""
        lost = self._lease
        assert lost is not None
        log.warning("our lease %s is gone from etcd: creating it again", lost.subnet)
        again = await self._write(lost.subnet, 0, reservation=False)
        if again is not None:
            log.info("Allocated lease (%s) to current node", lost.subnet.ipv4)
            self._foreign_puts = 0
            self._readiness.clear(CONFLICT)
            return
        current = await self._etcd.get(lease_key(self._prefix, lost.subnet))
        if current.kv is not None and self._own_lease(current.kv) is not None:
            self._look_at(current.kv)
            return
        lease = await self.acquire()
        self._foreign_puts = 0
        self._readiness.clear(CONFLICT)
        log.error(
            "our subnet changed from %s to %s: containers that have addresses of the old one are "
            "cut off until they are restarted",
            lost.subnet.ipv4,
            lease.subnet.ipv4,
        )
        await on_change(lease)
