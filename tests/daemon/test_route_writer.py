"""The kernel's routes follow what is wanted, however slow the kernel is and whoever else asks."""

from __future__ import annotations

import asyncio
import errno
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from ipaddress import IPv4Address, IPv4Network
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyflannel.dataplane.route import IPAddress, IPNetwork
from pyflannel.node.route_writer import RouteWriter

SUBNETS = [IPv4Network(f"10.5.{n}.0/24") for n in range(3)]
HOSTS = [IPv4Address(f"192.0.2.{n}") for n in range(2)]


class Kernel:
    """Does what it is asked one after the other, each at the next `turn`."""

    def __init__(self) -> None:
        self.routes: dict[IPNetwork, IPAddress] = {}
        self.refuses: set[IPNetwork] = set()
        self.work: list[tuple[asyncio.Future[Any], Callable[..., Any], tuple[Any, ...]]] = []

    async def run(self, work: Callable[..., Any], *args: Any) -> Any:
        done = asyncio.get_running_loop().create_future()
        self.work.append((done, work, args))
        return await done

    def turn(self) -> bool:
        if self.work:
            done, work, args = self.work.pop(0)
            if done.cancelled():
                return True
            try:
                done.set_result(work(*args))
            except OSError as error:
                done.set_exception(error)
            return True
        return False

    def apply(
        self, replace: Mapping[IPNetwork, IPAddress], delete: Sequence[IPNetwork]
    ) -> list[tuple[IPNetwork, int]]:
        for subnet in delete:
            self.routes.pop(subnet, None)
        self.routes |= {x: host for x, host in replace.items() if x not in self.refuses}
        return [(x, 22) for x in replace if x in self.refuses]

    write_ahead = apply

    def may_write_ahead(self) -> bool:
        return not self.routes

    def sync(
        self, wanted: Mapping[IPNetwork, IPAddress]
    ) -> tuple[int, int, list[tuple[IPNetwork, int]]]:
        self.routes = {x: host for x, host in wanted.items() if x not in self.refuses}
        return 0, 0, [(x, 22) for x in wanted if x in self.refuses]


class Node:
    """A writer, its slow kernel, and a FIB in front."""

    def __init__(self, pause_seconds: float = 0) -> None:
        self.kernel = Kernel()
        self.wanted: dict[IPNetwork, IPAddress] = {}
        self.fib: set[IPNetwork] = set()
        kernel: Any = self.kernel
        self.writer = RouteWriter("flannel.1", kernel, kernel, self.fib.discard, pause_seconds)
        self.looks: list[asyncio.Future[None]] = []

    def change(self, subnet: IPNetwork, host: IPAddress | None) -> None:
        if host is not None:
            self.wanted[subnet] = host
            self.fib.add(subnet)
        elif self.wanted.pop(subnet, None) is None:
            return
        self.writer.change({subnet: host})

    def look(self) -> None:
        self.looks.append(asyncio.ensure_future(self.writer.reconcile()))

    async def settle(self) -> None:
        for _ in range(4):
            await asyncio.sleep(0)

    async def finish(self) -> None:
        await self.settle()
        while self.kernel.turn():
            await self.settle()
        await asyncio.gather(*self.looks)

    @contextmanager
    def running(self) -> Iterator[None]:
        running = asyncio.ensure_future(self.writer.run())
        try:
            yield
            assert not running.done(), running.result()
        finally:
            running.cancel()


_CHANGES = st.tuples(st.sampled_from(SUBNETS), st.sampled_from([*HOSTS, None]))
_STEPS = st.lists(st.one_of(_CHANGES, st.sampled_from(["turn", "look"])), max_size=40)


@given(steps=_STEPS)
def test_whatever_comes_meanwhile_the_last_word_is_written(steps: list[Any]) -> None:
    async def play() -> None:
        node = Node()
        with node.running():
            for step in steps:
                if step == "turn":
                    node.kernel.turn()
                    await node.settle()
                elif step == "look":
                    node.look()
                else:
                    node.change(*step)
                # Nobody's packets find a route and no entry behind it.
                assert node.fib >= node.wanted.keys()
            await node.finish()
            assert node.kernel.routes == node.wanted
            assert node.fib == set(node.wanted)

    asyncio.run(play())


async def test_what_comes_while_the_kernel_is_busy_goes_at_once_afterwards() -> None:
    node = Node()
    with node.running():
        for subnet in SUBNETS:
            node.change(subnet, HOSTS[0])
            await node.settle()
        node.change(SUBNETS[1], HOSTS[1])
        assert len(node.kernel.work) == 1
        node.kernel.turn()
        await node.settle()
        ((_, _, batch),) = node.kernel.work
        assert batch == ({SUBNETS[1]: HOSTS[1], SUBNETS[2]: HOSTS[0]}, [])


async def test_what_comes_soon_after_a_batch_goes_in_one() -> None:
    node = Node(pause_seconds=0.5)
    with node.running():
        for subnet in SUBNETS:
            node.change(subnet, HOSTS[0])
            await node.settle()
            node.kernel.turn()
            await node.settle()
        assert node.kernel.routes == {SUBNETS[0]: HOSTS[0]}
        deadline = time.monotonic() + 5
        while not node.kernel.work:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.001)
        ((_, _, batch),) = node.kernel.work
        assert batch == (dict.fromkeys(SUBNETS[1:], HOSTS[0]), [])


async def test_a_refusal_is_told_once_and_forgotten_when_it_is_over(
    caplog: pytest.LogCaptureFixture,
) -> None:
    node = Node()
    node.kernel.refuses.add(SUBNETS[0])
    with node.running():
        for host in HOSTS:
            node.change(SUBNETS[0], host)
            await node.finish()
            node.look()
            await node.finish()
        assert node.writer.refused == {SUBNETS[0]: 22}
        assert caplog.text.count("kernel route to") == 1
        node.change(SUBNETS[0], None)
        await node.finish()
        assert node.writer.refused == {}


async def test_what_is_written_is_not_written_again_unless_it_was_refused() -> None:
    node = Node()
    node.kernel.refuses.add(SUBNETS[1])
    with node.running():
        for _ in range(2):
            node.change(SUBNETS[0], HOSTS[0])
            node.change(SUBNETS[1], HOSTS[0])
            await node.settle()
            ((_, _, (replaced, _)),) = node.kernel.work
            await node.finish()
            assert node.writer.refused == {SUBNETS[1]: 22}
        assert replaced == {SUBNETS[1]: HOSTS[0]}
        node.kernel.refuses.clear()
        node.look()
        await node.finish()
        assert node.writer.refused == {}


async def test_routes_are_written_while_others_are_still_to_come() -> None:
    node = Node()

    async def start() -> None:
        async with node.writer.writing_early():
            for subnet in SUBNETS:
                node.change(subnet, HOSTS[0])
                await node.settle()

    starting = asyncio.ensure_future(start())
    await node.settle()
    assert node.kernel.turn()  # it has no routes
    await node.settle()
    ((_, _, batch),) = node.kernel.work
    assert batch == ({SUBNETS[0]: HOSTS[0]}, [])
    await node.finish()
    await starting
    assert node.kernel.routes == node.wanted == dict.fromkeys(SUBNETS, HOSTS[0])


async def test_nothing_is_written_before_routes_of_an_earlier_run_were_looked_at() -> None:
    node = Node()
    node.kernel.routes = {SUBNETS[0]: HOSTS[0]}

    async def start() -> None:
        async with node.writer.writing_early():
            node.change(SUBNETS[1], HOSTS[1])
            await node.settle()

    starting = asyncio.ensure_future(start())
    await node.finish()
    await starting
    assert node.kernel.routes == {SUBNETS[0]: HOSTS[0]}
    node.look()
    await node.finish()
    assert node.kernel.routes == {SUBNETS[1]: HOSTS[1]}


async def test_a_start_that_fails_leaves_nobody_writing() -> None:
    node = Node()
    before = asyncio.all_tasks()

    async def start() -> None:
        async with node.writer.writing_early():
            node.change(SUBNETS[0], HOSTS[0])
            await node.settle()
            raise RuntimeError

    starting = asyncio.ensure_future(start())
    await node.finish()
    with pytest.raises(RuntimeError):
        await starting
    assert asyncio.all_tasks() == before


async def test_a_kernel_that_cannot_be_read_is_left_to_the_later_look(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    node = Node()

    def fail() -> bool:
        raise OSError(errno.ENODEV, "gone")

    async def start() -> None:
        async with node.writer.writing_early():
            node.change(SUBNETS[0], HOSTS[0])
            await node.settle()

    monkeypatch.setattr(node.kernel, "may_write_ahead", fail)
    starting = asyncio.ensure_future(start())
    await node.finish()
    await starting
    assert node.kernel.routes == {}
