"""A proxy before a real etcd that passes on what is read and watched, and holds writes back."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
import pytest_asyncio

from pyflannel.control import etcd_connection, lease_writer
from pyflannel.control.etcd import Etcd
from pyflannel.control.etcd_fault import EtcdHeld
from pyflannel.control.lease_keeper import NO_LEASE, STALE_LEASE
from pyflannel.control.own_lease import LeaseState
from pyflannel.control.quiet_grpc import grpc
from tests.control.test_lease_keeper import Node
from tests.control.until import until
from tests.lab.etcd import EtcdCluster

WRITES = ("Txn", "LeaseGrant", "LeaseRevoke")


class Proxy(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpc has no types
    """Passes calls on as bytes; `held` counts the writes that wait for `passes`."""

    def __init__(self, target: str) -> None:
        self._channel = grpc.aio.insecure_channel(target.removeprefix("http://"))
        self._server = grpc.aio.server(handlers=[self])
        self.passes = asyncio.Event()
        self.passes.set()
        self.held = 0

    async def start(self) -> str:
        """Return the endpoint."""
        port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        return f"http://127.0.0.1:{port}"

    async def close(self) -> None:
        """End what runs."""
        await self._server.stop(None)
        await self._channel.close()

    def service(self, details: Any) -> Any:
        """Return what handles one call."""
        if details.method.endswith("/Watch"):
            return grpc.stream_stream_rpc_method_handler(self._watch(details.method))
        return grpc.unary_unary_rpc_method_handler(self._ask(details.method))

    def _ask(self, method: str) -> Callable[[bytes, Any], Awaitable[bytes]]:
        async def ask(request: bytes, _: Any) -> bytes:
            if method.endswith(WRITES) and not self.passes.is_set():
                self.held += 1
                await self.passes.wait()
            answer: bytes = await self._channel.unary_unary(method)(request)
            return answer

        return ask

    def _watch(self, method: str) -> Callable[[AsyncIterator[bytes], Any], AsyncIterator[bytes]]:
        async def watch(requests: AsyncIterator[bytes], _: Any) -> AsyncIterator[bytes]:
            async for answer in self._channel.stream_stream(method)(requests):
                yield answer

        return watch


@pytest_asyncio.fixture
async def proxy(cluster: EtcdCluster) -> AsyncIterator[Proxy]:
    made = Proxy(cluster.endpoints[0])
    yield made
    await made.close()


@pytest_asyncio.fixture
async def client(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Etcd]:
    """A client behind the proxy, of little patience."""
    for name in ("etcd_connection.PATIENCE_MAX", "etcd_connection.REQUEST"):
        monkeypatch.setattr(f"pyflannel.control.{name}_SECONDS", 2.0)
    for module in (lease_writer.__name__, "pyflannel.control.lease_keeper"):
        monkeypatch.setattr(f"{module}.RETRY_SECONDS", 0.01)
    monkeypatch.setattr("pyflannel.control.lease_keeper.RENEW_CHECK_SECONDS", 0.01)
    made = Etcd([await proxy.start()])
    yield made
    await made.close()


async def test_a_write_that_is_held_leaves_what_is_read_alone(
    proxy: Proxy, client: Etcd, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "pyflannel")
    await client.get("x")
    caplog.clear()
    proxy.passes.clear()
    with pytest.raises(EtcdHeld, match=etcd_connection.WRITES_HELD):
        await client.grant(60)
    assert proxy.held == 2  # each endpoint is tried, and the first once more
    watch = client.watch("x", prefix=False, after_revision=0)
    await watch.__anext__()
    following = asyncio.ensure_future(watch.__anext__())
    for _ in range(2):
        with pytest.raises(EtcdHeld, match=etcd_connection.WRITES_HELD):
            await client.grant(60)
        await client.get("x")
    assert proxy.held == 4
    assert client.session.is_well
    assert client.session.last_error == etcd_connection.WRITES_HELD
    assert client.session.failures == 0
    assert caplog.messages == []
    assert not following.done()
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)
    proxy.passes.set()
    assert await client.grant(60)


async def test_a_lease_that_cannot_be_written_is_told_once_until_it_can(
    proxy: Proxy, client: Etcd, cluster: EtcdCluster, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    """One node starts, another had its lease and lost it."""
    caplog.set_level(logging.INFO, "pyflannel")
    holder, starter = Node(client, prefix, 1), Node(client, prefix, 2)
    await holder.keeper.acquire()
    async with holder.running():
        proxy.passes.clear()
        caplog.clear()
        cluster.run("del", holder.key)
        starting = asyncio.ensure_future(starter.keeper.acquire())
        await until(lambda: NO_LEASE in holder.reasons.now and NO_LEASE in starter.reasons.now, 30)
        await until(lambda: len(holder.reasons.ever) > 2 and len(starter.reasons.ever) > 2, 30)
        assert holder.keeper.own.state is LeaseState.LOST
        for node in (holder, starter):
            assert etcd_connection.WRITES_HELD in node.reasons.now[NO_LEASE]
            assert len(set(node.reasons.ever)) == 1
        assert len([x for x in caplog.messages if "etcd" in x]) == 1
        proxy.passes.set()
        await asyncio.wait_for(starting, 30)
        await until(lambda: holder.keeper.own.state is LeaseState.HELD, 30)
        assert holder.reasons.now == starter.reasons.now == {}


@pytest.mark.parametrize(("left", "is_late"), [(3500, False), (1700, True)])
async def test_a_lease_that_is_not_renewed_makes_unready_in_time(
    proxy: Proxy,
    client: Etcd,
    prefix: str,
    caplog: pytest.LogCaptureFixture,
    left: float,
    is_late: bool,
) -> None:
    caplog.set_level(logging.INFO, "pyflannel")
    node = Node(client, prefix, margin=3600)
    node.keeper.take_over(await node.keeper.acquire(), time.time() + left)
    proxy.passes.clear()
    async with node.running():
        await until(lambda: proxy.held > 3, 30)
        assert caplog.text.count("cannot renew") == 1
        assert list(node.reasons.now) == ([STALE_LEASE] if is_late else [])
        assert len(set(node.reasons.ever)) == is_late
        proxy.passes.set()
        await until(lambda: node.keeper.own.renewals == 1, 30)
        assert node.reasons.now == {}
    assert "etcd does not answer" not in caplog.text


async def test_a_new_address_that_cannot_be_told_makes_unready(
    proxy: Proxy, client: Etcd, prefix: str
) -> None:
    node = Node(client, prefix)
    await node.keeper.acquire()
    proxy.passes.clear()
    async with node.running():
        moved = node.keeper.own.public_ip
        assert moved is not None
        node.keeper.advertise(moved + 1000)
        await until(lambda: STALE_LEASE in node.reasons.now, 30)
        assert etcd_connection.WRITES_HELD in node.reasons.now[STALE_LEASE]
        proxy.passes.set()
        await until(lambda: not node.reasons.now, 30)
