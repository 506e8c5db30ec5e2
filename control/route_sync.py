"""Carries etcd's view of all leases through the table to the data plane, and keeps it current.

A snapshot, then a watch from the revision behind it. Whatever ends the watch, forwarding goes on
with the table as it is. Source: spec section 6.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Sequence
from typing import Protocol

from pyflannel.control.etcd import Compacted, Etcd, EtcdUnavailable, Put, Snapshot
from pyflannel.control.lease import subnets_prefix
from pyflannel.control.lease_table import LeaseTable
from pyflannel.dataplane.route import RouteChange

log = logging.getLogger(__name__)

BACK_OFF_SECONDS = 0.1
BACK_OFF_MAX_SECONDS = 5.0
REMIND_EVERY = 20


class RouteSink(Protocol):
    """What programs routes."""

    async def apply(self, changes: Sequence[RouteChange]) -> None:
        """Program the changes in order."""


class RouteSync:
    """Keeps the table and its routes in step with etcd."""

    def __init__(self, etcd: Etcd, prefix: str, table: LeaseTable, sink: RouteSink) -> None:
        self._etcd = etcd
        self._prefix = subnets_prefix(prefix)
        self._table = table
        self._sink = sink
        self._revision = 0
        self._cluster_id = 0
        self._failures = 0

    async def first_snapshot(self) -> None:
        """Program every lease that etcd knows now; waits for etcd as long as it takes."""
        while True:
            try:
                await self._take_snapshot()
            except EtcdUnavailable as error:
                await self._back_off(error)
            else:
                return

    async def run(self) -> None:
        """Follow etcd for ever."""
        while True:
            try:
                await self._follow()
            except Compacted as reason:
                log.info("listing all leases anew: %s", reason)
                await self.first_snapshot()
            except EtcdUnavailable as error:
                await self._back_off(error)
                # The watch alone would not show that the store went back while it was away.
                await self.first_snapshot()

    async def _follow(self) -> None:
        # Keys are `<prefix>/subnets/…`; the slash keeps out others that begin alike.
        watch = self._etcd.watch(self._prefix + "/", prefix=True, from_revision=self._revision + 1)
        async for batch in watch:
            if self._failures:
                log.info("etcd answers again; following leases from revision %d", self._revision)
                self._failures = 0
            changes: list[RouteChange] = []
            for event in batch.events:
                if isinstance(event, Put):
                    changes += self._table.put(event.kv)
                else:
                    changes += self._table.delete(event.key)
            if changes:
                await self._sink.apply(changes)
            self._revision = max(self._revision, batch.revision)

    async def _take_snapshot(self) -> None:
        snapshot = await self._etcd.snapshot(self._prefix + "/")
        changes = self._table.reset(snapshot.kvs, same_history=self._is_same_history(snapshot))
        self._revision, self._cluster_id = snapshot.revision, snapshot.cluster_id
        if changes:
            await self._sink.apply(changes)

    def _is_same_history(self, snapshot: Snapshot) -> bool:
        """Whether the snapshot continues the store we knew; a wiped or restored one does not."""
        if self._cluster_id == 0:
            return True
        same = snapshot.cluster_id == self._cluster_id and snapshot.revision >= self._revision
        if not same:
            log.error(
                "etcd was wiped or went back from revision %d to %d: peers that are missing in it "
                "stay in use until their leases are deleted",
                self._revision,
                snapshot.revision,
            )
        return same

    async def _back_off(self, error: EtcdUnavailable) -> None:
        if self._failures % REMIND_EVERY == 0:
            log.warning("leases cannot be followed, forwarding goes on as it is: %s", error)
        delay = min(BACK_OFF_SECONDS * 2 ** min(self._failures, 10), BACK_OFF_MAX_SECONDS)
        self._failures += 1
        await asyncio.sleep(delay * (0.5 + random.random() / 2))
