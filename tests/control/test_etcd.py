"""The client against a real etcd: reads, compare-and-swap, watches, and members that fail."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from pyflannel.control import etcd as etcd_module
from pyflannel.control import etcd_connection
from pyflannel.control.etcd import Compacted, Etcd, Put, WatchBatch, prefix_end
from pyflannel.control.etcd_fault import EtcdRejected, EtcdUnavailable
from pyflannel.control.etcd_session import SessionState
from pyflannel.dataplane.refusal import Refusal
from tests.control.until import until
from tests.lab.etcd import EtcdCluster, etcd_on_loopback

pytestmark = pytest.mark.slow


async def collect(etcd: Etcd, key: str, after: int, count: int, *, prefix: bool) -> list[str]:
    """Return the first events of a watch as text."""
    seen: list[str] = []
    async with contextlib.aclosing(etcd.watch(key, prefix=prefix, after_revision=after)) as batches:
        async for batch in batches:
            for event in batch.events:
                if isinstance(event, Put):
                    seen.append(f"{event.kv.key.decode()}={event.kv.value.decode()}")
                else:
                    seen.append(f"{event.key.decode()} deleted")
            if len(seen) >= count:
                break
    return seen


def test_prefix_end() -> None:
    assert prefix_end(b"/a/") == b"/a0"
    assert prefix_end(b"a\xff") == b"b"
    assert prefix_end(b"\xff") == b"\0"


async def test_compare_and_swap(etcd: Etcd, prefix: str) -> None:
    key = f"{prefix}/k"
    made = await etcd.put_if(key, b"1", 0, 0)
    assert made.succeeded
    lost = await etcd.put_if(key, b"2", 0, 0)
    assert not lost.succeeded
    assert lost.current is not None
    assert (lost.current.value, lost.current.mod_revision) == (b"1", made.revision)
    assert (await etcd.put_if(key, b"3", 0, made.revision)).succeeded
    assert not (await etcd.delete_if(key, made.revision)).succeeded
    reading = await etcd.get(key)
    assert reading.kv is not None
    assert reading.kv.value == b"3"
    assert (await etcd.delete_if(key, reading.kv.mod_revision)).succeeded
    assert (await etcd.get(key)).kv is None


async def test_a_lease_takes_its_key_along(etcd: Etcd, prefix: str) -> None:
    lease = await etcd.grant(1000)
    await etcd.put_if(f"{prefix}/k", b"1", lease, 0)
    assert 990 < await etcd.time_to_live(lease) <= 1000
    await etcd.revoke(lease)
    assert (await etcd.get(f"{prefix}/k")).kv is None
    assert await etcd.time_to_live(lease) == -1
    with pytest.raises(EtcdRejected, match="lease not found"):
        await etcd.revoke(lease)
    assert etcd.session.is_well


async def test_a_snapshot_is_paged_at_one_revision(
    etcd: Etcd, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(etcd_module, "PAGE_KEYS", 7)
    for number in range(23):
        await etcd.put_if(f"{prefix}/{number:03}", str(number).encode(), 0, 0)
    await etcd.put_if(f"{prefix}x", b"not below", 0, 0)
    snapshot = await etcd.snapshot(f"{prefix}/")
    assert [kv.value.decode() for kv in snapshot.kvs] == [str(n) for n in range(23)]
    assert snapshot.revision == (await etcd.get("none")).revision
    assert snapshot.cluster_id == etcd.session.cluster_id != 0


async def test_a_prefix_watch_and_an_exact_one(etcd: Etcd, prefix: str) -> None:
    own, other = f"{prefix}/10.5.1.0-24", f"{prefix}/10.5.1.0-24&fd00::-64"
    before = (await etcd.get("none")).revision
    await etcd.put_if(other, b"x", 0, 0)
    await etcd.put_if(own, b"a", 0, 0)
    await etcd.delete_if(other, before + 1)
    assert await collect(etcd, own, before, 1, prefix=False) == [f"{own}=a"]
    assert await collect(etcd, f"{prefix}/", before, 3, prefix=True) == [
        f"{other}=x",
        f"{own}=a",
        f"{other} deleted",
    ]


async def test_a_catch_up_resumes_behind_its_last_event(etcd: Etcd, prefix: str) -> None:
    revision, seen, sizes = (await etcd.get("none")).revision, 0, []
    for number in range(1500):
        await etcd.put_if(f"{prefix}/k{number}", b"x", 0, 0)
    while seen < 1500:
        watch = etcd.watch(f"{prefix}/", prefix=True, after_revision=revision)
        async with contextlib.aclosing(watch) as batches:
            async for batch in batches:
                if batch.events:
                    seen += len(batch.events)
                    sizes.append(len(batch.events))
                    revision = batch.revision
                    break
    assert seen == 1500
    assert len(sizes) > 1


@pytest.mark.parametrize("exact", [False, True])
async def test_a_watch_of_compacted_revisions(
    etcd: Etcd, cluster: EtcdCluster, prefix: str, exact: bool
) -> None:
    for number in range(3):
        await etcd.put_if(f"{prefix}/k{number}", b"x", 0, 0)
    revision = (await etcd.get("none")).revision
    cluster.run("compaction", str(revision))
    with pytest.raises(Compacted):
        await collect(etcd, f"{prefix}/k1", revision - 3, 1, prefix=not exact)
    assert etcd.session.is_well


async def test_a_deletion_is_not_missed_whose_own_revision_is_compacted(
    etcd: Etcd, cluster: EtcdCluster, prefix: str
) -> None:
    key = f"{prefix}/k"
    known = (await etcd.put_if(key, b"x", 0, 0)).revision
    assert (await etcd.delete_if(key, known)).revision == known + 1
    cluster.run("compaction", str(known + 1))
    with pytest.raises(Compacted):
        await collect(etcd, key, known, 1, prefix=False)


@pytest.mark.parametrize("endpoints", [(), ("192.0.2.1:2379",), ("ftp://192.0.2.1",)])
def test_bad_endpoints(endpoints: tuple[str, ...]) -> None:
    with pytest.raises(Refusal, match="endpoint"):
        Etcd(endpoints)


async def _first(etcd: Etcd, batches: list[WatchBatch]) -> None:
    """Watch everything for as long as it stands."""
    async with contextlib.aclosing(etcd.watch("/", prefix=True, after_revision=0)) as watch:
        async for batch in watch:
            batches.append(batch)


async def answered(etcd: Etcd) -> None:
    """Ask again and again until there is an answer."""
    while True:
        with contextlib.suppress(EtcdUnavailable):
            await etcd.get("x")
            return


async def test_a_killed_etcd_ends_the_watch_at_once_and_is_not_hammered(folder: Path) -> None:
    with etcd_on_loopback(folder) as cluster:
        etcd = Etcd(cluster.endpoints)
        batches: list[WatchBatch] = []
        watching = asyncio.ensure_future(_first(etcd, batches))
        await until(lambda: batches)
        cluster.members[0].kill()
        with pytest.raises(EtcdUnavailable):
            await asyncio.wait_for(watching, 8)  # a silent one is given up after ten
        started, cpu, asked = time.monotonic(), time.process_time(), 0
        while time.monotonic() - started < 5:
            with pytest.raises(EtcdUnavailable, match="Connection refused"):
                await etcd.get("x")
            asked += 1
        assert asked < 15
        assert time.process_time() - cpu < 1
        session = etcd.session
        assert session.state is SessionState.LOST
        assert session.silence_seconds is not None
        assert session.silence_seconds >= 5
        assert "Connection refused" in session.last_error
        cluster.start(wait=False)
        await answered(etcd)
        assert etcd.session.is_well
        await etcd.close()


async def test_a_frozen_etcd_is_noticed_by_a_request_and_its_watch_ends(folder: Path) -> None:
    with etcd_on_loopback(folder) as cluster:
        etcd = Etcd(cluster.endpoints)
        batches: list[WatchBatch] = []
        watching = asyncio.ensure_future(_first(etcd, batches))
        await until(lambda: batches)
        cluster.members[0].freeze()
        started = time.monotonic()
        with pytest.raises(EtcdUnavailable):
            await etcd.get("x")
        with pytest.raises(EtcdUnavailable, match="no answer in time"):
            await watching
        # A connection on which nothing is asked is given up after twelve.
        assert time.monotonic() - started < 10
        cluster.members[0].thaw()
        await etcd.get("x")
        await etcd.close()


@contextlib.asynccontextmanager
async def slow(target: str, delays: Callable[[], Iterator[float]]) -> AsyncIterator[str]:
    """Stand before an endpoint; what etcd says arrives so many seconds later, piece by piece."""
    host, _, port = target.removeprefix("http://").partition(":")

    async def pump(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter, seconds: Iterator[float]
    ) -> None:
        under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

        async def depart() -> None:
            octets = b"not read yet"
            while octets:
                octets = await reader.read(65536)
                under_way.put_nowait((time.monotonic() + next(seconds), octets))

        async def arrive() -> None:
            octets = b"not here yet"
            while octets:
                due, octets = await under_way.get()
                await asyncio.sleep(due - time.monotonic())
                writer.write(octets)
            writer.close()

        await asyncio.gather(depart(), arrive())

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        etcd_reader, etcd_writer = await asyncio.open_connection(host, port)
        await asyncio.gather(
            pump(reader, etcd_writer, itertools.repeat(0.0)),
            pump(etcd_reader, writer, delays()),
            return_exceptions=True,
        )

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    server.close()


async def test_a_slow_etcd_gets_more_time(
    cluster: EtcdCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each answer takes longer than twice the first patience, though the connection stands."""
    monkeypatch.setattr(etcd_connection, "REQUEST_SECONDS", 0.3)

    connections = 0

    def all_but_the_first_words() -> Iterator[float]:
        nonlocal connections
        connections += 1
        return itertools.chain([0.0], itertools.repeat(0.7))

    async with slow(cluster.endpoints[0], all_but_the_first_words) as endpoint:
        etcd = Etcd([endpoint])
        in_a_row = 0
        for _ in range(20):
            before = connections, etcd.session.failures
            with contextlib.suppress(EtcdUnavailable):
                await etcd.get("x")
            in_a_row = in_a_row + 1 if (connections, etcd.session.failures) == before else 0
            if in_a_row == 3:
                break
        assert in_a_row == 3
        await etcd.close()


async def test_what_was_asked_on_a_dead_connection_is_asked_on_the_next_at_once(
    cluster: EtcdCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CONNECT_SECONDS", "REQUEST_SECONDS"):
        monkeypatch.setattr(etcd_connection, name, 3600.0)
    silent = asyncio.Event()

    def dying() -> Iterator[float]:
        yield 0.0
        silent.set()
        yield 3600.0

    connections = iter([dying(), itertools.repeat(0.0)])
    async with slow(cluster.endpoints[0], lambda: next(connections)) as endpoint:
        etcd = Etcd([endpoint])
        asking = asyncio.ensure_future(etcd.get("x"))
        await silent.wait()
        etcd.reconnect("our address has changed")
        await asyncio.wait_for(asking, 30)
        assert etcd.session.failures == 0
        await etcd.close()


async def test_three_members_fail_over(folder: Path) -> None:
    with etcd_on_loopback(folder, 3) as cluster:
        etcd = Etcd(cluster.endpoints)
        batches: list[WatchBatch] = []
        watching = asyncio.ensure_future(_first(etcd, batches))
        await until(lambda: batches)
        assert etcd.session.endpoint == cluster.endpoints[0]
        cluster.members[0].kill()
        with pytest.raises(EtcdUnavailable):
            await watching
        # The dead one may have led; an election takes a second or two.
        await asyncio.wait_for(answered(etcd), 15)
        session = etcd.session
        assert session.endpoint in cluster.endpoints[1:]
        assert session.moves >= 1
        watching = asyncio.ensure_future(_first(etcd, batches))
        cluster.members[1].kill()
        with pytest.raises(EtcdUnavailable):
            await asyncio.wait_for(watching, 30)  # no leader, no watch
        for _ in range(2):
            with pytest.raises(EtcdUnavailable):
                await etcd.get("x")
        assert etcd.session.state is SessionState.LOST
        cluster.start(cluster.members[1])
        await asyncio.wait_for(answered(etcd), 15)
        await etcd.close()
