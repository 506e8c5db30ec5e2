"""The table follows a real etcd through bad neighbours, compaction, wipe and roll-back."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest

from pyflannel.control import route_sync
from pyflannel.control.etcd import Etcd, WatchBatch
from pyflannel.control.family_routes import Place
from pyflannel.control.lease import LeaseSubnet
from pyflannel.control.lease_table import LeaseTable
from pyflannel.control.route_sync import RouteSync
from pyflannel.dataplane.route import Delete, RouteChange
from tests.control.until import until
from tests.lab.etcd import EtcdCluster, etcd_on_loopback

NETWORK = IPv4Network("10.5.0.0/16")
OWN = "10.5.1.0-24"


def value(number: int, ip: str | None = None) -> str:
    return (
        f'{{"PublicIP":"{ip or f"192.0.2.{number}"}","PublicIPv6":null,"BackendType":"vxlan",'
        f'"BackendData":{{"VNI":1,"VtepMAC":"02:00:00:00:00:{number:02x}"}}}}'
    )


class Follower:
    """A route sync whose routes end here."""

    def __init__(self, etcd: Etcd, prefix: str) -> None:
        self.table = LeaseTable([Place(NETWORK, IPv4Address("192.0.2.1"))], 8472)
        self.table.set_own_subnet(LeaseSubnet(IPv4Network("10.5.1.0/24")))
        self.changes: list[RouteChange] = []
        self.sync = RouteSync(etcd, prefix, self.table, self)

    async def apply(self, changes: Sequence[RouteChange]) -> None:
        self.changes += changes

    @property
    def subnets(self) -> set[str]:
        return {str(route.subnet) for route in self.table.routes()}

    @property
    def removed(self) -> set[str]:
        return {str(change.subnet) for change in self.changes if isinstance(change, Delete)}

    @property
    def age(self) -> float:
        assert self.sync.view.age_seconds is not None
        return self.sync.view.age_seconds

    async def younger(self) -> None:
        """Wait until the view is younger than at the look before."""
        ages = [self.age]

        def is_younger() -> bool:
            ages.append(self.age)
            return ages[-1] < ages[-2]

        await until(is_younger, 2)

    @contextlib.asynccontextmanager
    async def following(self) -> AsyncIterator[None]:
        await self.sync.first_snapshot()
        running = asyncio.ensure_future(self.sync.run())
        try:
            await until(lambda: self.sync.view.is_following)
            yield
            assert not running.done(), running.result()
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


async def put(etcd: Etcd, prefix: str, name: str, text: str) -> None:
    key = f"{prefix}/subnets/{name}"
    kv = (await etcd.get(key)).kv
    assert (await etcd.put_if(key, text.encode(), 0, kv.mod_revision if kv else 0)).succeeded


async def delete(etcd: Etcd, prefix: str, name: str) -> None:
    key = f"{prefix}/subnets/{name}"
    kv = (await etcd.get(key)).kv
    assert kv is not None
    assert (await etcd.delete_if(key, kv.mod_revision)).succeeded


async def marker(etcd: Etcd, prefix: str, follower: Follower) -> None:
    """Put a peer and wait for it: all events before it have been seen then."""
    await put(etcd, prefix, "10.5.250.0-24", value(250))
    await until(lambda: "10.5.250.0/24" in follower.subnets)
    await delete(etcd, prefix, "10.5.250.0-24")
    await until(lambda: "10.5.250.0/24" not in follower.subnets)


async def test_every_robustness_vector_leaves_the_good_peer_alone(
    etcd: Etcd, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Spec section 19."""
    caplog.set_level(logging.WARNING)
    await put(etcd, prefix, "10.5.2.0-24", value(2))
    await put(etcd, prefix, OWN, value(1))
    follower = Follower(etcd, prefix)
    vectors = [
        ("foo", "bar"),
        ("10.5.30.0-24", "{bad"),
        ("10.5.31.0-24", "{}"),
        ("10.5.32.0-24", value(32).replace("vxlan", "host-gw")),
        ("10.5.33.0-24", value(33).replace("02:00:00:00:00:21", "")),
        ("10.5.34.0-24&fd00:34::-64", value(34)),
        (f"{OWN}&fd00:9::-64", value(35)),
        ("10.5.35.0-24", value(35, "192.0.2.1")),
        ("10.5.2.128-25", value(36)),
        ("10.5.0.0-17", value(37)),
        ("10.300.0.0-24", value(38)),
    ]
    async with follower.following():
        for name, text in vectors:
            await put(etcd, prefix, name, text)
            await marker(etcd, prefix, follower)
            assert "10.5.2.0/24" in follower.subnets, name
        # The peer of a dual-stack key is used, as far as we carry its traffic.
        assert follower.subnets == {"10.5.2.0/24", "10.5.34.0/24"}
        quarantined = follower.table.quarantined()
        assert "10.5.2.0-24" in quarantined[f"{prefix}/subnets/10.5.2.128-25"]
        assert f"{prefix}/subnets/10.5.0.0-17" in quarantined
        assert set(follower.table.bad()) == {
            f"{prefix}/subnets/{name}"
            for name in ("foo", "10.5.30.0-24", "10.5.31.0-24", "10.300.0.0-24")
        }
        for name, _ in vectors:
            await delete(etcd, prefix, name)
        await delete(etcd, prefix, OWN)
        await marker(etcd, prefix, follower)
        assert follower.subnets == {"10.5.2.0/24"}
    assert follower.removed == {"10.5.250.0/24", "10.5.34.0/24"}
    said = [record.getMessage() for record in caplog.records]
    assert sum("10.5.30.0-24" in line for line in said) == 1
    assert sum("10.5.2.128-25" in line for line in said) == 1


async def test_a_compaction_while_away_is_mended_by_a_new_list(
    cluster: EtcdCluster, etcd: Etcd, prefix: str
) -> None:
    for number in (2, 3):
        await put(etcd, prefix, f"10.5.{number}.0-24", value(number))
    follower = Follower(etcd, prefix)
    await follower.sync.first_snapshot()
    await delete(etcd, prefix, "10.5.2.0-24")
    await put(etcd, prefix, "10.5.3.0-24", value(33))
    await put(etcd, prefix, "10.5.4.0-24", value(4))
    cluster.run("compaction", str((await etcd.get("none")).revision))
    running = asyncio.ensure_future(follower.sync.run())
    await until(lambda: follower.subnets == {"10.5.3.0/24", "10.5.4.0/24"})
    assert {str(route.vtep_mac) for route in follower.table.routes()} == {
        "02:00:00:00:00:21",
        "02:00:00:00:00:04",
    }
    assert follower.sync.view.snapshots == 2
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_the_probe_keeps_the_view_young_and_shows_when_it_ages(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(route_sync, "PROBE_SECONDS", 0.2)
    with etcd_on_loopback(folder) as cluster:
        etcd = Etcd(cluster.endpoints)
        follower = Follower(etcd, "/net")
        assert follower.sync.view.age_seconds is None
        async with follower.following():
            for _ in range(5):
                await follower.younger()
            cluster.members[0].kill()
            await until(lambda: not follower.sync.view.is_following)
            await until(lambda: follower.age > 1)
            cluster.start()
            await until(lambda: follower.sync.view.is_following and follower.age < 0.5)
        await etcd.close()


class SilentWatch(Etcd):
    """A client whose first watch begins and then tells nothing, as behind a proxy that hangs."""

    async def watch(
        self, key: str, *, prefix: bool, after_revision: int
    ) -> AsyncGenerator[WatchBatch, None]:
        watch = super().watch(key, prefix=prefix, after_revision=after_revision)
        async with contextlib.aclosing(watch) as batches:
            async for batch in batches:
                if self.session.moves == 0 and batch.events:
                    continue
                yield batch


async def test_a_watch_that_is_silent_for_too_long_is_given_up_and_told(
    cluster: EtcdCluster,
    prefix: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(route_sync, "PROBE_SECONDS", 0.05)
    # Two names of one member, so that leaving it is a move.
    etcd = SilentWatch([*cluster.endpoints, cluster.endpoints[0].replace("127.0.0.1", "localhost")])
    reconnect = etcd.reconnect

    def reconnect_once(why: str) -> None:
        monkeypatch.setattr(route_sync, "WATCH_SILENCE_SECONDS", 60.0)
        reconnect(why)

    monkeypatch.setattr(etcd, "reconnect", reconnect_once)
    follower = Follower(etcd, prefix)
    async with follower.following():
        await put(etcd, prefix, "10.5.2.0-24", value(2))
        await asyncio.sleep(0.2)
        assert follower.subnets == set()
        monkeypatch.setattr(route_sync, "WATCH_SILENCE_SECONDS", 0.1)
        await until(lambda: follower.subnets == {"10.5.2.0/24"})
        assert follower.sync.view.snapshots == 2
        await until(lambda: follower.sync.view.is_following)
        await marker(etcd, prefix, follower)
    await etcd.close()
    (line,) = [x for x in caplog.messages if x.startswith("the watch of all leases")]
    assert line == "the watch of all leases was silent for 0 min: connecting anew"


@pytest.mark.parametrize("grown", [False, True], ids=["young", "grown-past-us"])
async def test_a_wiped_store_removes_nobody_at_once(
    folder: Path, grown: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with etcd_on_loopback(folder) as cluster:
        etcd = Etcd(cluster.endpoints)
        for number in (2, 3, 4):
            await put(etcd, "/net", f"10.5.{number}.0-24", value(number))
        follower = Follower(etcd, "/net")
        async with follower.following():
            cluster.wipe()
            await until(lambda: not follower.sync.view.is_following)
            cluster.start(wait=False)
            other = Etcd(cluster.endpoints)
            await until_answered(other)
            await put(other, "/net", "10.5.2.0-24", value(2))
            if grown:
                for _ in range(20):
                    await put(other, "/net", "10.5.9.0-24", value(9))
            await put(other, "/net", "10.5.3.0-25", value(5))
            kept = {"10.5.2.0/24", "10.5.3.0/25", "10.5.4.0/24"} | (
                {"10.5.9.0/24"} if grown else set()
            )
            await until(lambda: follower.subnets == kept)
            await until(lambda: follower.sync.view.unconfirmed == 1)
            assert follower.removed == {"10.5.3.0/24"}  # overlapped
            await put(other, "/net", "10.5.4.0-24", value(4))
            await until(lambda: follower.sync.view.unconfirmed == 0)
            await delete(other, "/net", "10.5.2.0-24")
            await until(lambda: "10.5.2.0/24" not in follower.subnets)
            await other.close()
        await etcd.close()
    said = [x.getMessage() for x in caplog.records if "wiped or rolled back" in x.getMessage()]
    assert len(said) == 1


async def until_answered(etcd: Etcd) -> None:
    """Wait until etcd answers."""
    for _ in range(100):
        with contextlib.suppress(Exception):
            await etcd.get("none")
            return
    raise AssertionError("etcd does not answer")


async def test_a_store_restored_from_a_snapshot_removes_nobody_at_once(folder: Path) -> None:
    with etcd_on_loopback(folder) as cluster:
        etcd = Etcd(cluster.endpoints)
        await put(etcd, "/net", "10.5.2.0-24", value(2))
        await put(etcd, "/net", "10.5.8.0-24", value(8))
        cluster.save(folder / "backup")
        await delete(etcd, "/net", "10.5.8.0-24")
        await put(etcd, "/net", "10.5.3.0-24", value(3))
        follower = Follower(etcd, "/net")
        async with follower.following():
            cluster.restore(folder / "backup")
            cluster.start()
            # 10.5.8.0/24 is back, as the backup had it; 10.5.3.0/24 is not in it, and stays.
            everybody = {"10.5.2.0/24", "10.5.3.0/24", "10.5.8.0/24"}
            await until(lambda: follower.subnets == everybody)
            assert follower.sync.view.unconfirmed == 1
            assert follower.removed == set()
        await etcd.close()
