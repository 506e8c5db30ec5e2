"""Waits for an event or for time to pass, in loops that must end when they are cancelled."""

from __future__ import annotations

import asyncio


async def wait_for_event(event: asyncio.Event, seconds: float) -> bool:
    """Wait until the event is set, at most so long; return whether it is.

    Not `asyncio.wait_for`: before Python 3.12 it loses a cancellation that comes with the event.
    """
    waiter = asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait([waiter], timeout=seconds)
    finally:
        waiter.cancel()
    return event.is_set()
