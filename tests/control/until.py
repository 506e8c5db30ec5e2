"""Waiting for what the event loop, or an etcd beside it, brings about."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

LOOKS_PER_SECOND = 500


async def until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    """Wait for a condition; its looks are counted, so a stall of the machine uses up no time."""
    for _ in range(int(seconds * LOOKS_PER_SECOND)):
        if condition():
            return
        await asyncio.sleep(1 / LOOKS_PER_SECOND)
    raise AssertionError(f"not in {seconds:.0f} s")
