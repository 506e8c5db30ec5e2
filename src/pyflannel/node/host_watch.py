"""Follows the host's network: what changes under us is repaired, or told to the peers.

The thin shell around `host_change`: the kernel's events say where to look, a reading of the host
says what to do, the overlay does it. Everything is within a second, and forwarding stops only for
what is really gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace

from pyflannel.control.lease_keeper import Readiness
from pyflannel.control.lease_table import LeaseTable
from pyflannel.control.patience import wait_for_event
from pyflannel.dataplane.host_change import (
    EVERYTHING,
    Concern,
    Diagnosis,
    HostEvent,
    Overrun,
    Repair,
    concern,
    diagnose,
)
from pyflannel.dataplane.host_events import watch_host
from pyflannel.dataplane.netlink import Netlink
from pyflannel.dataplane.refusal import Refusal
from pyflannel.dataplane.route import IPAddress
from pyflannel.node.overlay import Overlay

log = logging.getLogger(__name__)

HOST, HOST_V6 = "host-network", "host-network-ipv6"
# What one `ip` command does is several events; they are answered by one look.
SETTLE_SECONDS = 0.05
# On a host where routes change all the time, looking takes a quarter of it at most.
SETTLE_FACTOR = 3
RETRY_SECONDS = 0.5
FULL_LOOK_SECONDS = 60.0


class HostWatch:
    """Keeps one overlay in step with the host.

    `on_moved` gets the new public IP, `on_resized` is called when the overlay's MTU is another.
    """

    def __init__(
        self,
        netlink: Netlink,
        overlay: Overlay,
        table: LeaseTable,
        readiness: Readiness,
        on_moved: Callable[[IPAddress], Awaitable[None]],
        on_resized: Callable[[], None],
    ) -> None:
        self._netlink = netlink
        self._overlay = overlay
        self._table = table
        self._readiness = readiness
        self._on_moved = on_moved
        self._on_resized = on_resized
        self._reason = HOST if overlay.version == 4 else HOST_V6
        self._told_mtu = overlay.underlying.mtu
        self._told_public_ip = overlay.underlying.public_ip
        # Another than the one in use from when the interface is back until it has an address.
        self._interface_index = overlay.in_use.interface_index
        self._ended_at = -math.inf
        self._concern = Concern.NOTHING
        self._changed = asyncio.Event()

    def forwarding_ended(self, error: Exception) -> None:
        """Take in that packets are not moved any more."""
        reason = error.strerror if isinstance(error, OSError) else error
        log.warning("forwarding on %s has ended: %s", self._overlay.device, reason)
        now = time.monotonic()
        again = now - self._ended_at < RETRY_SECONDS
        self._ended_at = now
        loop = asyncio.get_running_loop()
        loop.call_later(RETRY_SECONDS if again else 0, self._note, Concern.DEVICE)

    def _note(self, what: Concern) -> None:
        if what:
            self._concern |= what
            self._changed.set()

    def _on_event(self, event: HostEvent) -> None:
        if isinstance(event, Overrun):
            log.info("more changed on this host than the kernel could tell: looking at everything")
        used = replace(self._overlay.in_use, interface_index=self._interface_index)
        self._note(concern(event, used, self._table.has_route))

    async def run(self) -> None:
        """Repair for ever."""
        with contextlib.ExitStack() as stack:
            watch_host(self._on_event, self._overlay.netlink_port, stack)
            self._note(EVERYTHING)
            settle = SETTLE_SECONDS
            while True:
                if await wait_for_event(self._changed, FULL_LOOK_SECONDS):
                    await asyncio.sleep(settle)
                self._changed.clear()
                now, self._concern = self._concern or EVERYTHING, Concern.NOTHING
                began, failed = time.monotonic(), False
                try:
                    await self._look(now)
                except (Refusal, OSError) as error:
                    self._readiness.set(self._reason, f"{error}; trying again")
                    failed = True
                settle = max(SETTLE_SECONDS, SETTLE_FACTOR * (time.monotonic() - began))
                if failed:
                    await asyncio.sleep(RETRY_SECONDS)
                    self._note(now)

    async def _look(self, now: Concern) -> None:
        overlay = self._overlay
        if now & (Concern.UNDERLAY | Concern.DEVICE):
            used = overlay.in_use
            found = diagnose(used, await self._netlink.interfaces())
            self._interface_index = found.index
            if await self._mend(found):
                now |= Concern.ROUTES
            if found.trouble:
                self._readiness.set(
                    self._reason, f"{found.trouble}: nothing can be sent until it is back"
                )
            else:
                self._readiness.clear(self._reason)
        if now & Concern.ROUTES:
            await overlay.reconcile()

    async def _mend(self, found: Diagnosis) -> bool:
        """Do the repairs; return whether routes may have gone with what was amiss."""
        overlay, repair = self._overlay, found.repair
        if Repair.RESIZE in repair:
            overlay.resize(found.mtu)
        if Repair.REBIND in repair:
            await overlay.rebind(found.interface, found.index, found.address)
        if Repair.REOPEN in repair:
            overlay.reopen()
        if Repair.RESTART in repair:
            overlay.restart()
        if repair:
            await overlay.configure()
        if overlay.underlying.mtu != self._told_mtu:
            self._on_resized()
            self._told_mtu = overlay.underlying.mtu
        if overlay.underlying.public_ip != self._told_public_ip:
            await self._on_moved(overlay.underlying.public_ip)
            self._told_public_ip = overlay.underlying.public_ip
        return bool(repair)
