"""Waits for an event or for time to pass, in loops that must end when they are cancelled.

Not by `asyncio.wait_for`: before Python 3.12 it loses a cancellation that comes together with what
is waited for, and the loop goes on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def wait_for_event(event: asyncio.Event, seconds: float) -> bool:
    """Wait until the event is set, at most so long; return whether it is."""
    waiter = asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait([waiter], timeout=seconds)
    finally:
        waiter.cancel()
    return event.is_set()


async def within(seconds: float, work: Coroutine[Any, Any, T]) -> T:
    """Return what the work gives; asyncio.TimeoutError when it takes longer, and it has ended."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait([task], timeout=seconds)
        if not task.done():
            raise asyncio.TimeoutError
        return task.result()
    finally:
        task.cancel()
        # What it works on may be closed next.
        await asyncio.gather(task, return_exceptions=True)
