"""A real etcd whose database is full: it answers what is read, and takes no grant and no put."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from pyflannel.control import lease_writer
from pyflannel.control.etcd import Etcd
from pyflannel.control.etcd_fault import EtcdRejected
from pyflannel.control.lease_keeper import NO_LEASE
from pyflannel.control.own_lease import LeaseState
from tests.control.test_lease_keeper import Node
from tests.control.until import until
from tests.lab.etcd import EtcdCluster, etcd_on_loopback
from tests.lab.require import require_program


class Full:
    """An etcd with little room, and a client of it."""

    def __init__(self, cluster: EtcdCluster) -> None:
        self.cluster = cluster
        self.etcd = Etcd(cluster.endpoints)

    def fill(self) -> None:
        """Write until it takes no more."""
        for number in range(100):
            said = self.cluster.run("put", f"/filler/{number}", "x" * 50_000, check=False)
            if "database space exceeded" in said:
                return
        raise AssertionError("it took everything")

    def make_room(self) -> None:
        """Do what the log advises."""
        self.cluster.run("del", "--prefix", "/filler/")
        self.cluster.run("compaction", str(self.cluster.revision()))
        self.cluster.run("defrag")
        self.cluster.run("alarm", "disarm")


@pytest_asyncio.fixture
async def full(folder: Path) -> AsyncIterator[Full]:
    require_program("etcd")
    require_program("etcdctl")
    with etcd_on_loopback(folder, flags=["--quota-backend-bytes", "600000"]) as cluster:
        made = Full(cluster)
        yield made
        await made.etcd.close()


async def test_a_write_that_is_refused_leaves_the_connection_and_its_watch_alone(
    full: Full, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "pyflannel")
    await full.etcd.get("x")
    full.fill()
    caplog.clear()
    watch = full.etcd.watch("x", prefix=False, after_revision=0)
    await watch.__anext__()
    following = asyncio.ensure_future(watch.__anext__())
    with pytest.raises(EtcdRejected, match="its database is full, so it takes no writes"):
        await full.etcd.grant(60)
    await full.etcd.get("x")
    assert full.etcd.session.is_well
    assert full.etcd.session.moves == full.etcd.session.failures == 0
    assert caplog.messages == []
    assert not following.done()
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)


async def test_a_lease_that_cannot_be_written_is_told_once_until_it_can(
    full: Full, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One node starts, another had its lease and lost it."""
    monkeypatch.setattr(lease_writer, "RETRY_SECONDS", 0.01)
    monkeypatch.setattr("pyflannel.control.lease_keeper.RETRY_SECONDS", 0.01)
    caplog.set_level(logging.INFO, "pyflannel")
    holder, starter = Node(full.etcd, "/n", 1), Node(full.etcd, "/n", 2)
    await holder.keeper.acquire()
    async with holder.running():
        full.fill()
        caplog.clear()
        full.cluster.run("del", holder.key)
        starting = asyncio.ensure_future(starter.keeper.acquire())
        await until(lambda: NO_LEASE in holder.reasons.now and NO_LEASE in starter.reasons.now)
        await until(lambda: min(len(x.reasons.ever) for x in (holder, starter)) > 10)
        assert holder.keeper.own.state is LeaseState.LOST
        for node in (holder, starter):
            assert "its database is full" in node.reasons.now[NO_LEASE]
            assert len(set(node.reasons.ever)) == 1
        (line,) = caplog.messages
        assert line.endswith("is gone from etcd: creating it again")
        full.make_room()
        await starting
        await until(lambda: holder.keeper.own.state is LeaseState.HELD)
        assert holder.reasons.now == starter.reasons.now == {}
