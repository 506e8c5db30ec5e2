"""A loop that waits ends when it is cancelled, also when what it waits for comes at that moment."""

from __future__ import annotations

import asyncio

import pytest

from pyflannel.control.patience import wait_for_event, within

TURNS = 12
"""Of the event loop: more than any of the waits takes to end."""


async def _turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


@pytest.mark.parametrize("turns", range(TURNS))
async def test_a_cancellation_beside_the_answer_ends_the_loop(turns: int) -> None:
    asked: asyncio.Queue[int] = asyncio.Queue()

    async def serve() -> None:
        while True:
            await within(60, asked.get())

    serving = asyncio.ensure_future(serve())
    await _turns(TURNS)
    asked.put_nowait(1)
    await _turns(turns)
    serving.cancel()
    await _turns(TURNS)
    assert serving.cancelled()


@pytest.mark.parametrize("turns", range(TURNS))
async def test_a_cancellation_beside_the_event_ends_the_loop(turns: int) -> None:
    event = asyncio.Event()

    async def wait() -> None:
        while True:
            await wait_for_event(event, 60)
            event.clear()

    waiting = asyncio.ensure_future(wait())
    await _turns(TURNS)
    event.set()
    await _turns(turns)
    waiting.cancel()
    await _turns(TURNS)
    assert waiting.cancelled()


async def test_the_answer_the_error_and_the_time_out() -> None:
    async def answer(what: object) -> object:
        if isinstance(what, Exception):
            raise what
        return what

    ended = []

    async def never() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    assert await within(60, answer(7)) == 7
    with pytest.raises(OSError, match="gone"):
        await within(60, answer(OSError("gone")))
    with pytest.raises(asyncio.TimeoutError):
        await within(0.01, never())
    assert ended == [True]
