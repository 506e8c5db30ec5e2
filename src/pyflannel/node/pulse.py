"""Looks whether packets still get their turn, and feeds systemd's watchdog while they do.

The loop that runs this is alive by that; what it looks at are the threads that move packets. A
thread that hangs shows in /healthz, /readyz and the log, and the watchdog goes hungry.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping

from pyflannel.management.health import HUNG
from pyflannel.management.notify import notify
from pyflannel.node.parts import Node

ROUTES = "routes"
LOOK_SECONDS = 1.0
HUNG_SECONDS = 5.0
"""Idle threads turn every second, so this is far beyond a busy machine's delays."""


def watchdog_seconds(environ: Mapping[str, str]) -> float | None:
    """Return the time within which our supervisor wants a sign, None if it wants none."""
    if environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    text = environ.get("WATCHDOG_USEC", "")
    return int(text) / 1e6 if text.isdecimal() and int(text) else None


def _tell_refused(node: Node) -> None:
    refused = [pair for overlay in node.overlays for pair in overlay.refused.items()]
    if not refused:
        node.readiness.clear(ROUTES)
        return
    subnet, err = refused[0]
    more = f" and {len(refused) - 1} more" if len(refused) > 1 else ""
    node.readiness.set(
        ROUTES,
        f"the kernel refuses the route to {subnet}{more}: {os.strerror(err)}; "
        "`ip route` and `ip addr` show what is in its way",
    )


async def watch_pulse(node: Node, environ: Mapping[str, str]) -> None:
    """Look for ever; also whether the kernel has every peer's route."""
    within = watchdog_seconds(environ)
    period = LOOK_SECONDS if within is None else min(LOOK_SECONDS, within / 2)
    while True:
        hung = [x for x in node.overlays if x.silence > HUNG_SECONDS]
        for overlay in hung:
            node.readiness.set(
                HUNG,
                f"a packet thread of {overlay.device} has hung for more than "
                f"{HUNG_SECONDS:.0f} s; restart pyflannel-udp",
            )
        _tell_refused(node)
        if not hung:
            node.readiness.clear(HUNG)
            if within is not None:
                notify("WATCHDOG=1")
        await asyncio.sleep(period)
