"""Our own lease: acquire it, renew it, notice its loss and get it back, give it back.

The thin shell around `own_lease`: it reads our key, has it judged and does what the table says. It
writes only with compare-and-swap, so it can never take a subnet that somebody else got meanwhile.
Source: spec section 5, decisions 14, 15.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from ipaddress import IPv4Address
from typing import Protocol

from pyflannel.control.etcd import Compacted, Etcd, Put
from pyflannel.control.etcd_fault import EtcdRejected, EtcdUnavailable
from pyflannel.control.lease import (
    LEASE_TTL_SECONDS,
    BadLease,
    KeyValue,
    Lease,
    lease_key,
    parse_lease_attributes_untrusted,
    text_of,
)
from pyflannel.control.lease_list import RecentSnapshot
from pyflannel.control.lease_writer import LeaseWriter, OwnIdentity
from pyflannel.control.network_config import NetworkConfig
from pyflannel.control.own_lease import (
    COPIES_TOLERATED,
    TRANSITIONS,
    Action,
    LeaseState,
    OwnLease,
    Sighting,
    judge,
    seconds_to_renewal,
)
from pyflannel.control.patience import until_one_ends, within
from pyflannel.control.subnet_pool import SubnetsExhausted
from pyflannel.dataplane.route import IPAddress, MacAddress

log = logging.getLogger(__name__)

RETRY_SECONDS = 1.0
EXHAUSTED_SECONDS = 5.0
RENEW_CHECK_SECONDS = 60.0
RELEASE_SECONDS = 5.0
"""Supervisors kill what does not end; where etcd refuses us a request alone may wait for 30 s."""
LATE = 0.5
"""Share of the margin before the lease's end within which it is too late for a first renewal."""

PROTESTS = 2 * (COPIES_TOLERATED + 1)
"""So many puts of ours show a host that has just started that it has a twin, also one that misses
some, as two were written before it looked.
"""
PROTEST_SECONDS = 10.0
"""After so long without a put of its own the other has started anew, or may have."""

CONFLICT = "duplicate-public-ip"
NO_LEASE = "no-lease"
STALE_LEASE = "stale-lease"
SUBNET_CHANGED = "subnet-changed"


_BY_OTHERS = (
    Sighting.RESERVED,
    Sighting.BARE,
    Sighting.COPIED,
    Sighting.TWIN,
    Sighting.FOREIGN,
)


def _now() -> float:
    """Return seconds of the clock that nobody sets and that goes on while the host is suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _is_of(kv: KeyValue, mac: MacAddress) -> bool:
    """Whether a key is written by the host with this VTEP MAC."""
    with contextlib.suppress(BadLease):
        vtep = parse_lease_attributes_untrusted(kv.value).vtep
        return vtep is not None and vtep.mac == mac
    return False


class Readiness(Protocol):
    """Where reasons for not being ready go."""

    def set(self, reason: str, sentence: str) -> None:
        """Become unready."""

    def clear(self, reason: str) -> None:
        """Take a reason back."""


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
        self._identity = identity
        self._margin = renew_margin_seconds
        self._rng = rng
        self._readiness = readiness
        self._writer = LeaseWriter(etcd, prefix, config, identity, rng)
        self._state = LeaseState.SEEKING
        self._lease: Lease | None = None
        self._ends_at: float | None = None
        self._chance = 0.0
        self._written = 0
        self._is_renewal_told = False
        self._last_foreign = 0
        self._protests = 0
        self._protested_at = 0.0
        self._foreign_puts = self._renewals = self._losses = 0
        self._moved = asyncio.Event()
        # A reading of our key must not be judged while a write of ours is under way.
        self._lock = asyncio.Lock()

    @property
    def own(self) -> OwnLease:
        """Our lease as it stands, for health, status and metrics."""
        lease = self._lease
        return OwnLease(
            state=self._state,
            subnet=None if lease is None else lease.subnet,
            public_ip=self._identity.public_ip,
            vtep_mac=self._identity.vtep_mac,
            public_ipv6=self._identity.public_ipv6,
            vtep_mac_v6=self._identity.vtep_mac_v6,
            etcd_lease=0 if lease is None else lease.etcd_lease,
            expires_at=self._expires_at,
            renewals=self._renewals,
            losses=self._losses,
            foreign_puts=self._foreign_puts,
        )

    @property
    def _expires_at(self) -> float | None:
        return None if self._ends_at is None else time.time() + self._ends_at - _now()

    async def acquire(self, recent: RecentSnapshot | None = None) -> Lease:
        """Get a lease, however long it takes; SubnetsExhausted when none is free.

        `recent` may spare the first attempt a list.
        """
        lease = await self._writer.acquire(recent, self._tell_rejected)
        self._readiness.clear(NO_LEASE)
        return self._hold(lease)

    def _tell_rejected(self, error: EtcdRejected) -> None:
        self._readiness.set(NO_LEASE, f"etcd does not take our lease: {error}; trying again")

    def to_hand_over(self) -> tuple[KeyValue, float | None]:
        """Return our key as we know it, and when its etcd lease ends, for a successor."""
        lease = self._lease
        assert lease is not None
        key = lease_key(self._prefix, lease.subnet).encode()
        return lease.entry(key), self._expires_at

    def take_over(self, lease: Lease, expires_at: float | None) -> Lease:
        """Go on with the lease of the process before us; what it tells may have changed since."""
        self._hold(lease)
        self._ends_at = None if expires_at is None else _now() + expires_at - time.time()
        if lease.etcd_lease:
            self._writer.granted.append(lease.etcd_lease)
        if lease.attributes.to_json() != self._writer.value:
            self._moved.set()
        return lease

    def let_go(self) -> None:
        """Leave the lease to a successor: it is not ours to judge or give back any more."""
        self._state = LeaseState.RELEASED

    async def release(self) -> None:
        """Give our lease back, so that others may have the subnet; a reservation is kept."""
        lease = self._lease
        if lease is None or self._state not in (LeaseState.HELD, LeaseState.LOST):
            return
        try:
            # Only what is attached to the etcd lease goes with it: never a key others wrote.
            await within(RELEASE_SECONDS, self._etcd.revoke(lease.etcd_lease))
        except (EtcdUnavailable, asyncio.TimeoutError) as error:
            why = str(error) or "etcd does not answer in time"
            log.warning("lease %s is not given back, it ends by itself: %s", lease.subnet, why)
            return
        self._state = LeaseState.RELEASED
        log.info("Lease %s given back", lease.subnet)

    def _hold(self, lease: Lease, *, is_contested: bool = False) -> Lease:
        """Take a lease that we wrote just now for our own."""
        self._lease = lease
        if self._state is not LeaseState.RELEASED:
            held = LeaseState.HELD if lease.etcd_lease else LeaseState.RESERVED
            self._state = LeaseState.CONTESTED if is_contested else held
        self._ends_at = _now() + LEASE_TTL_SECONDS if lease.etcd_lease else None
        self._chance = self._rng.random()
        self._written = lease.mod_revision
        self._fresh()
        return lease

    def _fresh(self) -> None:
        """Take in that etcd has our value, for as long as an etcd lease lasts."""
        self._is_renewal_told = False
        self._readiness.clear(STALE_LEASE)

    async def run(self, on_change: Callable[[Lease], Awaitable[None]]) -> None:
        """Renew and watch for ever; `on_change` gets a lease of another subnet."""
        await until_one_ends(
            self._follow_for_ever(on_change), self._renew_for_ever(), self._advertise_for_ever()
        )

    async def _follow_for_ever(self, on_change: Callable[[Lease], Awaitable[None]]) -> None:
        while True:
            try:
                await self._follow(on_change)
            except Compacted as reason:
                log.info("reading our own lease anew: %s", reason)
            except EtcdUnavailable as error:
                if isinstance(error, EtcdRejected) and self._state is LeaseState.LOST:
                    self._tell_rejected(error)
                log.debug("cannot watch our own lease: %s", error)
                await asyncio.sleep(RETRY_SECONDS * self._rng.random())
            except SubnetsExhausted as error:
                self._readiness.set(NO_LEASE, f"our subnet was taken, and {error}")
                await asyncio.sleep(EXHAUSTED_SECONDS)

    def advertise(self, public_ip: IPAddress) -> None:
        """Have our lease tell another public IP of a family, as soon as etcd takes it."""
        if isinstance(public_ip, IPv4Address):
            self._identity = replace(self._identity, public_ip=public_ip)
        else:
            self._identity = replace(self._identity, public_ipv6=public_ip)
        self._moved.set()

    async def _advertise_for_ever(self) -> None:
        while True:
            await self._moved.wait()
            self._moved.clear()
            while not await self._advertise(self._identity):
                await asyncio.sleep(RETRY_SECONDS * self._rng.random())

    async def _advertise(self, identity: OwnIdentity) -> bool:
        """Write our new value over the old one; whether nothing is left to do."""
        async with self._lock:
            lease = self._lease
            if lease is None:
                return False
            self._writer.identify(identity)
            try:
                kv = (await self._etcd.get(lease_key(self._prefix, lease.subnet))).kv
                if kv is not None and not _is_of(kv, identity.vtep_mac):
                    # Somebody else's: the watch of our key has seen it and decides.
                    return True
                reservation = self._state is LeaseState.RESERVED
                written = await self._writer.write(lease.subnet, kv, reservation=reservation)
            except EtcdRejected as error:
                self._readiness.set(
                    STALE_LEASE,
                    f"our lease {lease.subnet} does not tell our new address yet, so peers send "
                    f"to the old one: {error}; trying again",
                )
                return False
            except EtcdUnavailable as error:
                log.debug("cannot advertise our new address: %s", error)
                return False
            if written is None:
                return False
            self._hold(written)
            self._quiet()
        log.info("Using %s as external address", written.attributes.public_ip)
        return True

    async def _renew_for_ever(self) -> None:
        check = min(RENEW_CHECK_SECONDS, max(self._margin / 10, 1.0))
        while True:
            delay = check
            if self._state is LeaseState.HELD and self._ends_at is not None:
                delay = seconds_to_renewal(self._ends_at, _now(), self._margin, self._chance)
            if delay <= 0:
                async with self._lock:
                    delay = 0 if await self._renew() else check
            await asyncio.sleep(min(delay, check))

    async def _renew(self) -> bool:
        """Put the same value under a new etcd lease; whether that is done."""
        lease = self._lease
        if lease is None or self._state is not LeaseState.HELD:
            return False
        try:
            renewed = await self._writer.write(lease.subnet, lease, reservation=False)
        except EtcdUnavailable as error:
            self._tell_not_renewed(lease, error)
            return False
        if renewed is None:
            log.warning("lease %s was changed by somebody else: not renewed", lease.subnet)
            return False
        self._hold(renewed)
        self._renewals += 1
        when = time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(self._expires_at))
        log.info("Lease renewed, new expiration: %s", when)
        return True

    def _tell_not_renewed(self, lease: Lease, error: EtcdUnavailable) -> None:
        assert self._ends_at is not None
        if not self._is_renewal_told:
            self._is_renewal_told = True
            log.error("cannot renew lease %s, trying again: %s", lease.subnet, error)
        if self._ends_at - _now() < self._margin * LATE:
            # No error in it: that may be another for each endpoint and so be said again and again.
            self._readiness.set(
                STALE_LEASE,
                f"our lease {lease.subnet} ends within {self._margin * LATE / 60:.0f} min and "
                "cannot be renewed, as etcd takes no writes or is not reached: peers will let go "
                "of us; trying again",
            )

    async def _follow(self, on_change: Callable[[Lease], Awaitable[None]]) -> None:
        """Read our own key and watch it, exactly it, until the watch ends or our subnet changes."""
        assert self._lease is not None
        subnet = self._lease.subnet
        key = lease_key(self._prefix, subnet)
        async with self._lock:
            reading = await self._etcd.get(key)
            self._written = 0
            await self._settle(reading.kv, on_change)
        if self._lease.subnet != subnet:
            return
        watch = self._etcd.watch(key, prefix=False, after_revision=reading.revision)
        async with contextlib.aclosing(watch) as batches:
            async for batch in batches:
                for event in batch.events:
                    kv = event.kv if isinstance(event, Put) else None
                    revision = (
                        event.kv.mod_revision if isinstance(event, Put) else (event.mod_revision)
                    )
                    async with self._lock:
                        # What our last write replaced is no news.
                        if revision > self._written:
                            await self._settle(kv, on_change)
                    if self._lease.subnet != subnet:
                        return

    async def _settle(
        self, kv: KeyValue | None, on_change: Callable[[Lease], Awaitable[None]]
    ) -> None:
        """Do what our key asks for, until there is nothing left to do."""
        while True:
            lease = self._lease
            assert lease is not None
            sighting = judge(
                lease, self._writer.value, self._writer.granted, kv, self._foreign_puts
            )
            if kv is not None and sighting in _BY_OTHERS and kv.mod_revision != self._last_foreign:
                self._last_foreign = kv.mod_revision
                self._foreign_puts += 1
            before = self._state
            if before is LeaseState.RELEASED:
                return
            self._state, action = TRANSITIONS[before, sighting]
            if action is Action.NOTHING:
                return
            if action in (Action.REPORT, Action.PROTEST):
                assert kv is not None
                if before is not LeaseState.CONTESTED:
                    self._readiness.set(CONFLICT, self._conflict(kv))
                if action is Action.REPORT or not self._may_protest():
                    return
                # Not yet: whoever is disturbed here protests again.
                self._state = before
            if action is Action.ACQUIRE:
                await self._move(lease, on_change)
                return
            if action is Action.ADOPT:
                assert kv is not None
                await self._adopt(lease, kv, sighting)
                return
            if action is Action.CREATE and before is not LeaseState.LOST:
                self._losses += 1
                log.warning("our lease %s is gone from etcd: creating it again", lease.subnet)
            if sighting is Sighting.COPIED:
                log.warning(
                    "somebody else put our own value to lease %s; if another host uses our public "
                    "IP %s, give each its own --public-ip",
                    lease.subnet,
                    self._identity.public_ip,
                )
            reservation = self._state is LeaseState.RESERVED or (
                sighting is Sighting.TWIN and kv is not None and kv.lease == 0
            )
            ours = await self._writer.write(lease.subnet, kv, reservation=reservation)
            if ours is not None:
                self._hold(ours, is_contested=action is Action.PROTEST)
                if action is not Action.PROTEST:
                    log.info("Allocated lease (%s) to current node", lease.subnet.ipv4)
                    self._quiet()
                return
            reading = await self._etcd.get(lease_key(self._prefix, lease.subnet))
            self._written, kv = reading.revision, reading.kv

    def _may_protest(self) -> bool:
        """Whether our twin is to see us once more: both answer, so both must stop."""
        now = _now()
        if now - self._protested_at > PROTEST_SECONDS:
            self._protests = 0
        self._protests += 1
        self._protested_at = now
        return self._protests <= PROTESTS

    async def _adopt(self, lease: Lease, kv: KeyValue, sighting: Sighting) -> None:
        """Take what the key says about itself for our own."""
        if kv.lease != lease.etcd_lease:
            ttl = await self._etcd.time_to_live(kv.lease) if kv.lease else 0
            self._ends_at = _now() + ttl if kv.lease else None
            self._fresh()
        if sighting is Sighting.RESERVED:
            log.warning("lease %s was put without an etcd lease: now a reservation", lease.subnet)
        self._lease = replace(
            lease,
            create_revision=kv.create_revision,
            mod_revision=kv.mod_revision,
            etcd_lease=kv.lease,
        )
        self._quiet()

    async def _move(self, lost: Lease, on_change: Callable[[Lease], Awaitable[None]]) -> None:
        """Our subnet is another host's: get another."""
        lease = await self.acquire()
        self._quiet()
        if lease.subnet == lost.subnet:
            return
        self._readiness.set(
            SUBNET_CHANGED,
            f"our subnet was {lost.subnet.ipv4}, which another host has now, and is "
            f"{lease.subnet.ipv4}: containers that have addresses of {lost.subnet.ipv4} keep them "
            "and are cut off; restart them, and then pyflannel-udp",
        )
        await on_change(lease)

    def _quiet(self) -> None:
        self._readiness.clear(CONFLICT)
        self._readiness.clear(NO_LEASE)

    def _conflict(self, kv: KeyValue) -> str:
        key, value = text_of(kv.key), text_of(kv.value[:200])
        address = self._identity.public_ip
        remedy = "stop who wrote it, then restart"
        with contextlib.suppress(BadLease):
            if parse_lease_attributes_untrusted(kv.value).public_ip == address:
                used = f"our public IP {address}"
                if _is_of(kv, self._identity.vtep_mac):
                    used += ", and as a copy of this one our VTEP MAC"
                remedy = f"another host uses {used}; give each its own --public-ip and restart"
        return f"somebody else wrote to our lease {key}: {value}; {remedy}"
