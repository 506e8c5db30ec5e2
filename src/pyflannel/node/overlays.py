"""The overlays of all address families as one."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

from pyflannel.control.lease import LeaseSubnet
from pyflannel.dataplane.route import IPNetwork, RouteChange
from pyflannel.node.overlay import Overlay


class Overlays:
    """The overlays of a node, IPv4 first; `each` grows while they are opened."""

    def __init__(self, each: list[Overlay]) -> None:
        self.each = each

    @property
    def mtu(self) -> int:
        """The largest packet, in bytes, that every family carries."""
        return min(overlay.underlying.mtu for overlay in self.each)

    @property
    def pairs(self) -> tuple[tuple[IPNetwork, IPNetwork], ...]:
        """Each family's network, and our subnet in it; only after `adopt`."""
        return tuple((overlay.network, overlay.subnet) for overlay in self.each)

    async def adopt(self, subnet: LeaseSubnet) -> None:
        """Configure each device for our subnet; Refusal of the first, after all were tried."""
        outcomes = await asyncio.gather(
            *(overlay.adopt(part) for overlay, part in zip(self.each, subnet.parts)),
            return_exceptions=True,
        )
        for outcome in outcomes:
            if outcome is not None:
                raise outcome

    async def apply(self, changes: Sequence[RouteChange]) -> None:
        """Program route changes of any family."""
        for overlay in self.each:
            await overlay.apply(changes)

    @contextlib.asynccontextmanager
    async def writing_early(self) -> AsyncIterator[None]:
        """Let the kernel's routes follow `apply` at once, until `reconcile`, where that is safe."""
        async with contextlib.AsyncExitStack() as stack:
            for overlay in self.each:
                await stack.enter_async_context(overlay.writing_early())
            yield

    async def reconcile(self) -> None:
        """Make the kernel's routes to peers what the FIBs say."""
        for overlay in self.each:
            await overlay.reconcile()

    def keep_devices(self) -> None:
        """Leave the devices behind at exit from now on, as the start has succeeded."""
        for overlay in self.each:
            overlay.keep_device()

    def keep_queues(self) -> None:
        """Have the supervisor keep what packets queue in."""
        for overlay in self.each:
            overlay.keep_queues()
