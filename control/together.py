"""Runs coroutines beside each other so that none fails unseen and none is left behind."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable


async def until_one_ends(*work: Awaitable[None]) -> None:
    """Run all until one ends, end the others, and raise what it raised."""
    tasks = [asyncio.ensure_future(x) for x in work]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
