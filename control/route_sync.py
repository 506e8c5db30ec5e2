"""Carries etcd's view of all leases through the table to the data plane, and keeps it current.

A snapshot, then a watch from the revision behind it, and a small read every few seconds that shows
that etcd is there. A watch on which not even etcd's word of progress comes is given up. Whatever
ends the watch, forwarding goes on with the table as it is, and the next snapshot repairs it.
Source: spec section 6, decisions 17, 18.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from pyflannel.control.etcd import Compacted, Deleted, Etcd, Put
from pyflannel.control.etcd_fault import EtcdRejected, EtcdUnavailable
from pyflannel.control.history import History
from pyflannel.control.lease import KeyValue, config_key, subnets_prefix
from pyflannel.control.lease_list import SnapshotReader, snapshot_reader
from pyflannel.control.lease_table import LeaseTable
from pyflannel.control.patience import until_one_ends
from pyflannel.dataplane.route import RouteChange

log = logging.getLogger(__name__)

PROBE_SECONDS = 5.0
WATCH_SILENCE_SECONDS = 1500.0
"""etcd says every 10 to 11 minutes how far a watch is on which nothing happens."""
PART_EVENTS = 500
BACK_OFF_SECONDS = 0.1
BACK_OFF_MAX_SECONDS = 2.0
REMIND_EVERY = 100


class RouteSink(Protocol):
    """What programs routes."""

    async def apply(self, changes: Sequence[RouteChange]) -> None:
        """Program the changes in order."""


@dataclass(frozen=True, slots=True)
class LeaseView:
    """A reading of how current the table is; ages are in seconds, None before the first.

    `age_seconds` counts from the moment at which etcd was last known to say what the table says,
    `change_seconds` from the last event. `snapshots` counts lists, `unconfirmed` peers that are
    kept though a wiped or rolled-back store does not name them.
    """

    is_following: bool
    revision: int
    age_seconds: float | None
    change_seconds: float | None
    snapshots: int
    unconfirmed: int


class RouteSync:
    """Keeps the table and its routes in step with etcd."""

    def __init__(self, etcd: Etcd, prefix: str, table: LeaseTable, sink: RouteSink) -> None:
        self._etcd = etcd
        self._prefix = subnets_prefix(prefix) + "/"
        self._read = snapshot_reader(etcd, prefix)
        self._probed_key = config_key(prefix)
        self._table = table
        self._sink = sink
        self._history = History()
        self._is_following = False
        self._confirmed_at: float | None = None
        self._heard_at = 0.0
        self._changed_at: float | None = None
        self._snapshots = 0
        self._failures = 0

    @property
    def view(self) -> LeaseView:
        """How current the table is."""
        now = time.monotonic()
        confirmed, changed = self._confirmed_at, self._changed_at
        return LeaseView(
            is_following=self._is_following,
            revision=self._history.revision,
            age_seconds=None if confirmed is None else now - confirmed,
            change_seconds=None if changed is None else now - changed,
            snapshots=self._snapshots,
            unconfirmed=len(self._table.unconfirmed()),
        )

    async def first_snapshot(self, read: SnapshotReader | None = None) -> None:
        """Program every lease that etcd knows now; waits for etcd as long as it takes.

        `read` gives the leases, which may be a moment old.
        """
        while True:
            try:
                return await self._take_snapshot(read or self._read)
            except EtcdUnavailable as error:
                await self._back_off(error)

    async def run(self) -> None:
        """Follow etcd for ever."""
        while True:
            try:
                await self._follow()
            except Compacted as reason:
                log.info("listing all leases anew: %s", reason)
            except EtcdUnavailable as error:
                await self._back_off(error)
            # After each break, as a watch would not show that the store went back meanwhile.
            await self.first_snapshot()

    async def _follow(self) -> None:
        """Watch until the watch breaks or a probe shows that the store went back."""
        try:
            await until_one_ends(self._watch(), self._probe())
        finally:
            self._is_following = False

    async def _watch(self) -> None:
        watch = self._etcd.watch(self._prefix, prefix=True, after_revision=self._history.revision)
        async with contextlib.aclosing(watch) as batches:
            async for batch in batches:
                self._failures = 0
                self._is_following = True
                self._confirmed_at = self._heard_at = time.monotonic()
                if batch.events:
                    self._changed_at = self._confirmed_at
                for start in range(0, len(batch.events), PART_EVENTS):
                    await self._take(batch.events[start : start + PART_EVENTS])
                    await asyncio.sleep(0)  # so that much at once does not stop all else
                self._history.advance(batch.revision)

    async def _take(self, events: Iterable[Put | Deleted]) -> None:
        taken: list[tuple[bytes, KeyValue | None]] = []
        for event in events:
            if isinstance(event, Put):
                self._history.put(event.kv)
                taken.append((event.kv.key, event.kv))
            else:
                self._history.deleted(event.key)
                taken.append((event.key, None))
        changes = self._table.take(taken)
        if changes:
            await self._sink.apply(changes)

    async def _probe(self) -> None:
        """Ask for one key now and then; returns when the answer is of an older store.

        A watch that is silent for too long ends with its connection, and the one of our own key,
        which is on the same, too.
        """
        while True:
            await asyncio.sleep(PROBE_SECONDS)
            asked_at, known = time.monotonic(), self._history.revision
            reading = await self._etcd.get(self._probed_key)
            if reading.revision < known:
                return
            if self._is_following:
                silence = asked_at - self._heard_at
                if silence > WATCH_SILENCE_SECONDS:
                    why = f"the watch of all leases was silent for {silence / 60:.0f} min"
                    log.warning("%s: connecting anew", why)
                    self._etcd.reconnect(why)
                    return
                self._confirmed_at = max(asked_at, self._confirmed_at or 0.0)
            changes = self._table.expire(asked_at)
            if changes:
                await self._sink.apply(changes)

    async def _take_snapshot(self, read: SnapshotReader) -> None:
        snapshot = await read()
        why = self._history.reset(snapshot.cluster_id, snapshot.revision, snapshot.kvs)
        parts: Iterable[Sequence[RouteChange]]
        if self._snapshots:
            now = snapshot.asked_at
            parts = [self._table.reset(snapshot.kvs, same_history=not why, now=now)]
        else:
            parts = self._table.load(snapshot.kvs)
        self._snapshots += 1
        self._confirmed_at = snapshot.asked_at
        if why:
            log.error(
                "etcd was wiped or rolled back, %s: %d peers that it does not name stay in use "
                "until they come back, are overlapped, or a day is over",
                why,
                len(self._table.unconfirmed()),
            )
        for changes in parts:
            if changes:
                await self._sink.apply(changes)
            await asyncio.sleep(0)  # so that what the sink began goes on meanwhile

    async def _back_off(self, error: EtcdUnavailable) -> None:
        """Wait longer from time to time; an etcd that is away is waited for in the client."""
        if isinstance(error, EtcdRejected) and self._failures % REMIND_EVERY == 0:
            log.error("leases cannot be followed, forwarding goes on as it is: %s", error)
        delay = min(BACK_OFF_SECONDS * 2 ** min(self._failures, 10), BACK_OFF_MAX_SECONDS)
        self._failures += 1
        await asyncio.sleep(delay * (0.5 + random.random() / 2))
