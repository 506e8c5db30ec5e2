"""Waits for an event, for time to pass or for one of several to end, and ends when cancelled.

Not by `asyncio.wait_for`: before Python 3.12 it loses a cancellation that comes together with what
is waited for, and the loop goes on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")


async def wait_for_event(event: asyncio.Event, seconds: float) -> bool:
    """Wait until the event is set, at most so long; return whether it is."""
    waiter = asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait([waiter], timeout=seconds)
    finally:
        waiter.cancel()
    return event.is_set()


async def within(seconds: float, work: Awaitable[T]) -> T:
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


async def until_one_ends(*work: Awaitable[None]) -> None:
    """Run all until one ends, end the others, and raise what it raised: none fails unseen."""
    tasks = [asyncio.ensure_future(x) for x in work]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
