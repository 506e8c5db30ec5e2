"""Keeps the kernel's routes to peers behind the FIB, without letting the FIB wait for them.

The kernel takes its time, 0.15 ms for each route where there are 10,000. What changes while it
writes, and for a moment after, is collected, the last word on each subnet counts, and all of it
goes in the next batch. What is written already is not written again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence

from pyflannel.dataplane.kernel_routes import PeerRoutes
from pyflannel.dataplane.netlink import Netlink
from pyflannel.dataplane.route import IPAddress, IPNetwork

log = logging.getLogger(__name__)

PAUSE_SECONDS = 0.2
"""After a batch: one for every few routes would make the thread that writes take turns with the one
that reads what etcd says, which then falls behind at 1,000 changes a second.
"""


class RouteWriter:
    """Writes one device's routes; `on_gone` is called, at least once, when the kernel lost one.

    The FIB keeps an entry until then, so that no packet finds a route and no entry.
    """

    def __init__(
        self,
        device: str,
        netlink: Netlink,
        routes: PeerRoutes,
        on_gone: Callable[[IPNetwork], object],
        pause_seconds: float = PAUSE_SECONDS,
    ) -> None:
        self._device = device
        self._netlink = netlink
        self._routes = routes
        self._on_gone = on_gone
        self._pause_seconds = pause_seconds
        self._wanted: dict[IPNetwork, IPAddress] = {}
        self._written: dict[IPNetwork, IPAddress] = {}
        """What the kernel has for certain; not while it is being changed."""
        self._unwritten: set[IPNetwork] = set()
        self._changed = asyncio.Event()
        self._has_reconciled = False
        self.refused: dict[IPNetwork, int] = {}
        """Peers whose route the kernel has refused, with its errno."""

    def change(self, changes: Mapping[IPNetwork, IPAddress | None]) -> None:
        """Have routes to subnets behind these underlay addresses, None where there shall be none.

        `run`, `writing_early` or `reconcile` writes them.
        """
        for subnet, underlay in changes.items():
            if underlay is None:
                self._wanted.pop(subnet, None)
            else:
                self._wanted[subnet] = underlay
            if underlay is None or self._written.get(subnet) != underlay:
                self._unwritten.add(subnet)
        if self._unwritten:
            self._changed.set()

    async def run(self) -> None:
        """Write for ever."""
        while True:
            await self._changed.wait()
            await self._write(self._routes.apply)
            await asyncio.sleep(self._pause_seconds)

    @contextlib.asynccontextmanager
    async def writing_early(self) -> AsyncIterator[None]:
        """Write what changes in this context at once, `reconcile` is to follow.

        So the kernel's time for many routes and ours for as many leases pass together. Where the
        kernel has routes of ours already, only `reconcile` can tell which of them are right.
        """
        may_write = False
        with contextlib.suppress(OSError):  # `reconcile` will say what is amiss
            may_write = await self._netlink.run(self._routes.may_write_ahead)
        if not may_write:
            yield
            return
        is_over = False

        async def write() -> None:
            while not is_over or self._unwritten:
                await self._changed.wait()
                await self._write(self._routes.write_ahead)

        writing = asyncio.ensure_future(write())
        try:
            yield
            is_over = True
            self._changed.set()
            await writing
        finally:
            writing.cancel()
            await asyncio.gather(writing, return_exceptions=True)

    async def _write(self, write: Callable[..., list[tuple[IPNetwork, int]]]) -> None:
        """Write what has changed."""
        batch = self._take()
        replaced = {x: self._wanted[x] for x in batch if x in self._wanted}
        deleted = [x for x in batch if x not in self._wanted]
        for subnet in batch:
            self._written.pop(subnet, None)
        try:
            failed = await self._netlink.run(write, replaced, deleted)
            self._settle(batch, replaced, deleted, failed)
        except OSError as error:
            # All are written once the device is back.
            log.warning("%s: routes cannot be written: %s", self._device, error)
            self._settle((), {}, deleted, [])

    async def reconcile(self) -> None:
        """Look at all routes the kernel has, and make them what all changes until now say."""
        wanted = dict(self._wanted)
        deleted = [x for x in self._take() if x not in wanted]
        self._written = {}
        try:
            came, went, failed = await self._netlink.run(self._routes.sync, wanted)
        except OSError as error:
            log.error("routes on %s cannot be looked after: %s", self._device, error.strerror)
            self._settle((), {}, deleted, [])
            return
        self._settle(tuple(self.refused), wanted, deleted, failed)
        if came or went or not self._has_reconciled:
            log.info(
                "Routes on %s: %d peers, %d written, %d stale removed",
                self._device,
                len(wanted),
                came,
                went,
            )
        self._has_reconciled = True

    def _take(self) -> set[IPNetwork]:
        batch, self._unwritten = self._unwritten, set()
        self._changed.clear()
        return batch

    def _settle(
        self,
        tried: Iterable[IPNetwork],
        replaced: Mapping[IPNetwork, IPAddress],
        deleted: Sequence[IPNetwork],
        failed: Sequence[tuple[IPNetwork, int]],
    ) -> None:
        """Take in what was written; another word may have come meanwhile on any of it.

        `tried` are those whose earlier refusals count no more, `failed` is what was refused now.
        """
        wanted = self._wanted
        self._written |= {
            x: underlay for x, underlay in replaced.items() if wanted.get(x) == underlay
        }
        for subnet in deleted:
            if subnet not in wanted:
                self._on_gone(subnet)
        before = {x: self.refused.pop(x, None) for x in tried}
        for subnet, err in failed:
            self._written.pop(subnet, None)
            if before.get(subnet) != err:
                log.error("kernel route to %s: %s", subnet, os.strerror(err))
            self.refused[subnet] = err
