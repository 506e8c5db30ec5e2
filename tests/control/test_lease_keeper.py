"""Our own lease in a real etcd: the race for it, its renewal, its loss, and who else writes it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections.abc import AsyncIterator
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from pyflannel.control import lease_keeper, lease_list
from pyflannel.control.etcd import Etcd
from pyflannel.control.etcd_session import REFUSED_SECONDS
from pyflannel.control.lease import LEASE_TTL_SECONDS, Lease, LeaseSubnet, lease_key
from pyflannel.control.lease_keeper import (
    CONFLICT,
    NO_LEASE,
    PROTEST_SECONDS,
    SUBNET_CHANGED,
    LeaseKeeper,
)
from pyflannel.control.lease_list import RECENT_SECONDS, RecentSnapshot
from pyflannel.control.lease_writer import OwnIdentity
from pyflannel.control.network_config import NetworkConfig, parse_network_config_untrusted
from pyflannel.control.own_lease import COPIES_TOLERATED, LeaseState
from pyflannel.control.subnet_pool import SubnetsExhausted
from pyflannel.dataplane.route import MacAddress
from tests.control.until import until
from tests.lab.etcd import EtcdCluster, etcd_on_loopback

OTHER = (
    '{"PublicIP":"192.0.2.200","PublicIPv6":null,"BackendType":"vxlan",'
    '"BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:c8"}}'
)


def config(network: str = "10.5.0.0/16", length: int = 24) -> NetworkConfig:
    text = {"Network": network, "SubnetLen": length, "Backend": {"Type": "vxlan"}}
    return parse_network_config_untrusted(json.dumps(text).encode())


class Reasons:
    """Collects what makes us unready."""

    def __init__(self) -> None:
        self.now: dict[str, str] = {}
        self.ever: list[str] = []

    def set(self, reason: str, sentence: str) -> None:
        self.now[reason] = sentence
        self.ever.append(sentence)

    def clear(self, reason: str) -> None:
        self.now.pop(reason, None)


class Node:
    """A keeper and what the test knows of it."""

    def __init__(
        self,
        etcd: Etcd,
        prefix: str,
        number: int = 1,
        *,
        network: NetworkConfig | None = None,
        margin: float = 3600,
        previous: str | None = None,
    ) -> None:
        self.reasons = Reasons()
        self.moves: list[Lease] = []
        self.prefix = prefix
        self.mac = MacAddress(b"\x02\0\0\0" + number.to_bytes(2, "big"))
        before = None if previous is None else LeaseSubnet(IPv4Network(previous))
        self.keeper = LeaseKeeper(
            etcd,
            prefix,
            network or config(),
            OwnIdentity(IPv4Address("192.0.2.0") + number, self.mac, before),
            margin,
            random.Random(number),
            self.reasons,
        )

    @property
    def key(self) -> str:
        subnet = self.keeper.own.subnet
        assert subnet is not None
        return lease_key(self.prefix, subnet)

    async def on_change(self, lease: Lease) -> None:
        self.moves.append(lease)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        running = asyncio.ensure_future(self.keeper.run(self.on_change))
        # Its first reading of the key must not be mistaken for the reaction to an event.
        await asyncio.sleep(0)
        try:
            yield
            assert not running.done(), running.result()
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


class SetClock:
    """The module `time`, with a wall clock that was set by some seconds."""

    def __init__(self, jump: float) -> None:
        self._jump = jump

    def time(self) -> float:
        return time.time() + self._jump

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


async def put(etcd: Etcd, key: str, value: str | bytes, lease: int = 0) -> None:
    """Write a key whatever is there, as etcdctl does."""
    octets = value.encode() if isinstance(value, str) else value
    while True:
        kv = (await etcd.get(key)).kv
        if (await etcd.put_if(key, octets, lease, kv.mod_revision if kv else 0)).succeeded:
            return


async def entry(etcd: Etcd, key: str) -> tuple[bytes, int] | None:
    """Return value and etcd lease of a key."""
    kv = (await etcd.get(key)).kv
    return None if kv is None else (kv.value, kv.lease)


async def test_sixty_starters_share_sixty_three_subnets(etcd: Etcd, prefix: str) -> None:
    network = config("10.5.0.0/24", 30)
    nodes = [Node(etcd, prefix, number, network=network) for number in range(1, 64)]
    leases = await asyncio.gather(*(node.keeper.acquire() for node in nodes))
    assert len({lease.subnet.ipv4 for lease in leases}) == 63
    snapshot = await etcd.snapshot(f"{prefix}/subnets/")
    assert len(snapshot.kvs) == 63
    for node, lease in zip(nodes, leases):
        found = await entry(etcd, node.key)
        assert found is not None
        assert json.loads(found[0])["BackendData"]["VtepMAC"] == str(node.mac)
        assert found[1] == lease.etcd_lease != 0
    with pytest.raises(SubnetsExhausted):
        await Node(etcd, prefix, 64, network=network).keeper.acquire()


async def test_the_previous_subnet_is_asked_for_first(etcd: Etcd, prefix: str) -> None:
    node = Node(etcd, prefix, previous="10.5.77.0/24")
    lease = await node.keeper.acquire()
    assert lease.subnet.ipv4 == IPv4Network("10.5.77.0/24")
    assert (await Node(etcd, prefix).keeper.acquire()).subnet == lease.subnet
    taken = Node(etcd, prefix, 2, previous="10.5.77.0/24")
    assert (await taken.keeper.acquire()).subnet != lease.subnet
    own = node.keeper.own
    assert own.state is LeaseState.HELD
    assert own.expires_at is not None
    assert abs(own.expires_at - time.time() - LEASE_TTL_SECONDS) < 5


async def test_a_list_that_is_a_moment_old_costs_a_second_attempt_at_most(
    etcd: Etcd, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_list, "RECENT_SECONDS", 3600)
    network = config("10.5.0.0/24", 30)
    recent = RecentSnapshot(etcd, prefix)
    before = await recent.read()
    others = [Node(etcd, prefix, number, network=network) for number in range(1, 63)]
    await asyncio.gather(*(node.keeper.acquire() for node in others))
    assert before is await recent.read() and not before.kvs
    mine = Node(etcd, prefix, 63, network=network, previous="10.5.0.4/30")
    lease = await asyncio.wait_for(mine.keeper.acquire(recent), 10)
    assert lease.subnet not in {node.keeper.own.subnet for node in others}


async def test_a_list_is_given_again_for_a_second_only(etcd: Etcd, prefix: str) -> None:
    recent = RecentSnapshot(etcd, prefix)
    before = await recent.read()
    began = time.monotonic()
    await put(etcd, f"{prefix}/subnets/10.5.9.0-24", OTHER)
    while (found := await recent.read()) is before:
        assert time.monotonic() - began < RECENT_SECONDS + 5
        await asyncio.sleep(0.01)
    assert len(found.kvs) == 1 and found.asked_at - began > RECENT_SECONDS - 0.1
    recent.forget()
    assert await recent.read() is not found


async def test_renewal_is_a_put_of_the_same_value_under_a_new_etcd_lease(
    etcd: Etcd, prefix: str
) -> None:
    node = Node(etcd, prefix, margin=LEASE_TTL_SECONDS - 0.3)
    lease = await node.keeper.acquire()
    before = await entry(etcd, node.key)
    async with node.running():
        await until(lambda: node.keeper.own.renewals >= 2)
    after = await entry(etcd, node.key)
    assert before is not None
    assert after is not None
    assert after[0] == before[0]
    assert after[1] not in (0, lease.etcd_lease)
    assert node.keeper.own.foreign_puts == 0
    assert node.reasons.ever == []


@pytest.mark.parametrize("jump", [-8 * 3600, 365 * 86400], ids=["back", "ahead"])
async def test_a_clock_that_is_set_neither_delays_a_renewal_nor_hurries_it(
    etcd: Etcd, prefix: str, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    node = Node(etcd, prefix, margin=LEASE_TTL_SECONDS - 1)
    started = time.monotonic()
    await node.keeper.acquire()
    # Only the keeper's: grpc's deadlines are of its clock, which a real jump moves as well.
    monkeypatch.setattr(lease_keeper, "time", SetClock(jump))
    async with node.running():
        await until(lambda: node.keeper.own.renewals == 1)
    assert time.monotonic() - started > 0.9
    expires_at = node.keeper.own.expires_at
    assert expires_at == pytest.approx(time.time() + jump + LEASE_TTL_SECONDS, abs=5)


@pytest.mark.alone
async def test_a_lost_lease_is_back_within_100_ms_of_the_event(etcd: Etcd, prefix: str) -> None:
    node = Node(etcd, prefix)
    lease = await node.keeper.acquire()
    key = node.key
    took = []
    async with node.running():
        for way in ("delete", "revoke", "delete", "revoke", "delete"):
            losses = node.keeper.own.losses
            start = (await etcd.get(key)).revision
            watch = etcd.watch(key, prefix=False, after_revision=start)
            async with contextlib.aclosing(watch) as batches:
                await batches.__anext__()
                if way == "delete":
                    kv = (await etcd.get(key)).kv
                    assert kv is not None
                    await etcd.delete_if(key, kv.mod_revision)
                else:
                    await etcd.revoke(node.keeper.own.etcd_lease)
                gone = None
                async for batch in batches:
                    if gone is None:
                        gone = time.monotonic()
                    if any(hasattr(event, "kv") for event in batch.events):
                        took.append(time.monotonic() - gone)
                        break
            await until(lambda before=losses: node.keeper.own.losses == before + 1)  # type: ignore[misc]
            await until(lambda: node.keeper.own.state is LeaseState.HELD)
    # Not each: the machine may stall.
    assert median(took) < 0.1, took
    assert node.moves == []
    assert node.key == lease_key(prefix, lease.subnet)
    assert node.reasons.ever == []


async def test_a_subnet_that_is_taken_is_replaced_with_one_loud_line(
    etcd: Etcd, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our key is deleted, and a rival creates it before we are through with our grant."""
    node = Node(etcd, prefix)
    lease = await node.keeper.acquire()
    key = node.key
    grant = etcd.grant

    async def grant_late(ttl: int) -> int:
        granted = await grant(ttl)
        await etcd.put_if(key, OTHER.encode(), 0, 0)
        return granted

    async with node.running():
        monkeypatch.setattr(etcd, "grant", grant_late)
        kv = (await etcd.get(key)).kv
        assert kv is not None
        await etcd.delete_if(key, kv.mod_revision)
        await until(lambda: node.moves)
    (moved,) = node.moves
    assert moved.subnet != lease.subnet
    assert await entry(etcd, key) == (OTHER.encode(), 0)
    assert node.keeper.own.state is LeaseState.HELD
    assert list(node.reasons.now) == [SUBNET_CHANGED]
    (sentence,) = node.reasons.ever
    assert f"containers that have addresses of {lease.subnet.ipv4}" in sentence
    assert str(moved.subnet.ipv4) in sentence


async def replace(etcd: Etcd, key: str) -> None:
    """Delete a key and create it for another host."""
    kv = (await etcd.get(key)).kv
    assert kv is not None
    await etcd.delete_if(key, kv.mod_revision)
    assert (await etcd.put_if(key, OTHER.encode(), 0, 0)).succeeded


async def test_when_no_subnet_is_left_we_wait_for_one_and_do_not_end(
    etcd: Etcd, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our lease ended while we were away from etcd, and the network is full."""
    monkeypatch.setattr("pyflannel.control.lease_keeper.EXHAUSTED_SECONDS", 0.1)
    network = config("10.5.0.0/28", 30)
    nodes = [Node(etcd, prefix, number, network=network) for number in (1, 2, 3)]
    for node in nodes:
        await node.keeper.acquire()
    first = nodes[0]
    await replace(etcd, first.key)
    async with first.running():
        await until(lambda: NO_LEASE in first.reasons.now)
        assert first.keeper.own.state is LeaseState.LOST
        kv = (await etcd.get(nodes[1].key)).kv
        assert kv is not None
        await etcd.delete_if(nodes[1].key, kv.mod_revision)
        await until(lambda: first.moves)
    assert list(first.reasons.now) == [SUBNET_CHANGED]


async def test_a_foreign_writer_is_reported_and_not_fought(etcd: Etcd, prefix: str) -> None:
    node = Node(etcd, prefix)
    await node.keeper.acquire()
    own = await entry(etcd, node.key)
    assert own is not None
    theirs = own[0].replace(str(node.mac).encode(), b"02:00:00:00:00:99")
    async with node.running():
        await put(etcd, node.key, theirs)
        await until(lambda: CONFLICT in node.reasons.now)
        assert "02:00:00:00:00:99" in node.reasons.now[CONFLICT]
        assert "--public-ip" in node.reasons.now[CONFLICT]
        for _ in range(3):
            await put(etcd, node.key, theirs)
        await until(lambda: node.keeper.own.foreign_puts == 4)
        assert node.keeper.own.state is LeaseState.CONTESTED
        assert await entry(etcd, node.key) == (theirs, 0)
        assert len(node.reasons.ever) == 1
        # The other host goes away: the key is ours again.
        kv = (await etcd.get(node.key)).kv
        assert kv is not None
        await etcd.delete_if(node.key, kv.mod_revision)
        await until(lambda: node.keeper.own.state is LeaseState.HELD)
    assert node.reasons.now == {}
    found = await entry(etcd, node.key)
    assert found is not None
    assert found[0] == own[0]


async def test_garbage_and_another_owner_on_our_key_are_reported(etcd: Etcd, prefix: str) -> None:
    for value in ("{bad", OTHER):
        node = Node(etcd, f"{prefix}/{value[1]}")
        await node.keeper.acquire()
        async with node.running():
            await put(etcd, node.key, value)
            await until(lambda node=node: CONFLICT in node.reasons.now)  # type: ignore[misc]
            assert value[:20] in node.reasons.now[CONFLICT]
        assert await entry(etcd, node.key) == (value.encode(), 0)


async def test_our_value_put_again_and_again_is_a_second_writer(
    etcd: Etcd, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A clone of this machine, with our MAC."""
    remedy = "uses our public IP 192.0.2.1, give each its own --public-ip"
    node, clone = Node(etcd, prefix), Node(etcd, prefix)
    await node.keeper.acquire()
    async with node.running():
        for puts in (1, 2):
            await clone.keeper.acquire()
            await until(lambda puts=puts: node.keeper.own.foreign_puts == puts)  # type: ignore[misc]
            assert node.reasons.now == {}
            await until(lambda puts=puts: caplog.text.count(remedy) == puts)  # type: ignore[misc]
        await clone.keeper.acquire()
        await until(lambda: CONFLICT in node.reasons.now)


@pytest.mark.parametrize("is_reserved", [False, True])
async def test_two_hosts_that_write_the_same_both_report_it(
    etcd: Etcd, prefix: str, monkeypatch: pytest.MonkeyPatch, is_reserved: bool
) -> None:
    """Copies without a state of their own: the second took the first one's lease and MAC."""

    def is_contested(node: Node) -> bool:
        return node.keeper.own.state is LeaseState.CONTESTED

    if is_reserved:
        await put(etcd, f"{prefix}/subnets/10.5.9.0-24", '{"PublicIP":"192.0.2.1"}')
    first, second = Node(etcd, prefix), Node(etcd, prefix)
    lease = await first.keeper.acquire()
    async with first.running():
        assert (await second.keeper.acquire()).subnet == lease.subnet
        async with second.running():
            for node in (first, second):
                await until(lambda node=node: is_contested(node))  # type: ignore[misc]
                assert (
                    "our public IP 192.0.2.1, and as a copy of this one our VTEP MAC"
                    in (node.reasons.now[CONFLICT])
                )
        # The second starts anew, and is told by the one that goes on.
        later = time.clock_gettime(time.CLOCK_BOOTTIME) + PROTEST_SECONDS + 60
        monkeypatch.setattr(lease_keeper, "_now", lambda: later)
        third = Node(etcd, prefix)
        await third.keeper.acquire()
        async with third.running():
            await until(lambda: is_contested(third))
    for node in (first, second, third):
        assert is_contested(node)
        assert len(node.reasons.ever) == 1
    kv = (await etcd.get(first.key)).kv
    assert kv is not None
    assert kv.version < 30
    assert (kv.lease == 0) is is_reserved


async def test_a_reservation_is_kept_without_an_etcd_lease(etcd: Etcd, prefix: str) -> None:
    key = f"{prefix}/subnets/10.5.9.0-24"
    await put(etcd, key, '{"PublicIP":"192.0.2.1"}')
    node = Node(etcd, prefix, margin=LEASE_TTL_SECONDS - 0.1)
    lease = await node.keeper.acquire()
    assert node.key == key
    assert lease.etcd_lease == 0
    async with node.running():
        own = node.keeper.own
        assert (own.is_reservation, own.expires_at) == (True, None)
        await put(etcd, key, '{"PublicIP":"192.0.2.1"}')  # the operator writes it once more
        await until(lambda: node.keeper.own.foreign_puts == 1)
        found = None
        while found is None or b"VtepMAC" not in found[0]:
            found = await entry(etcd, key)
        await asyncio.sleep(1)  # a lease would be renewed after a tenth
    assert found[1] == 0
    assert node.keeper.own.renewals == 0
    await node.keeper.release()
    assert await entry(etcd, key) == found


async def test_our_key_put_without_a_lease_becomes_a_reservation(etcd: Etcd, prefix: str) -> None:
    node = Node(etcd, prefix)
    await node.keeper.acquire()
    found = await entry(etcd, node.key)
    assert found is not None
    async with node.running():
        await put(etcd, node.key, found[0])
        await until(lambda: node.keeper.own.is_reservation)
        assert node.reasons.now == {}
    assert await entry(etcd, node.key) == (found[0], 0)


async def test_a_neighbour_whose_key_begins_like_ours_does_not_concern_us(
    etcd: Etcd, prefix: str
) -> None:
    node = Node(etcd, prefix)
    await node.keeper.acquire()
    other = f"{node.key}&fd00:9::-64"
    async with node.running():
        await put(etcd, other, OTHER)
        kv = (await etcd.get(other)).kv
        assert kv is not None
        await etcd.delete_if(other, kv.mod_revision)
        await put(etcd, node.key, OTHER)  # comes after, so what came before has been seen
        await until(lambda: CONFLICT in node.reasons.now)
    assert node.keeper.own.foreign_puts == 1
    assert node.keeper.own.losses == 0


async def test_a_compaction_does_not_disturb_the_watch_of_our_key(
    etcd: Etcd, cluster: EtcdCluster, prefix: str
) -> None:
    """The watch is cut, our key goes, the revisions of that are compacted, the watch comes back."""
    member = Etcd(cluster.endpoints)
    node = Node(member, prefix)
    await node.keeper.acquire()
    async with node.running():
        await until(lambda: member.session.is_well)
        cluster.members[0].kill()
        await until(lambda: not member.session.is_well)
        cluster.start()
        key = node.key
        kv = (await etcd.get(key)).kv
        assert kv is not None
        await etcd.delete_if(key, kv.mod_revision)
        cluster.run("compaction", str((await etcd.get("none")).revision))
        await until(lambda: node.keeper.own.losses == 1)
        await until(lambda: node.keeper.own.state is LeaseState.HELD)
    assert await entry(etcd, key) is not None
    await member.close()


async def test_release_gives_the_key_back_and_never_one_that_others_wrote(
    etcd: Etcd, prefix: str
) -> None:
    node = Node(etcd, prefix)
    await node.keeper.acquire()
    await node.keeper.release()
    assert await entry(etcd, node.key) is None
    assert node.keeper.own.state is LeaseState.RELEASED
    second = Node(etcd, prefix)
    await second.keeper.acquire()
    await put(etcd, second.key, OTHER)
    await second.keeper.release()
    assert await entry(etcd, second.key) == (OTHER.encode(), 0)


async def test_a_write_under_way_does_not_take_back_what_a_successor_has(
    etcd: Etcd, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = Node(etcd, prefix, margin=LEASE_TTL_SECONDS)
    await node.keeper.acquire()
    put_if = etcd.put_if

    async def put_while_letting_go(*words: Any) -> Any:
        node.keeper.let_go()
        return await put_if(*words)

    monkeypatch.setattr(etcd, "put_if", put_while_letting_go)
    async with node.running():
        await until(lambda: node.keeper.own.renewals)
    assert node.keeper.own.state is LeaseState.RELEASED
    await node.keeper.release()
    assert await entry(etcd, node.key) is not None


async def test_a_protest_under_way_does_not_take_back_what_a_successor_has(
    etcd: Etcd, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    node, twin = Node(etcd, prefix), Node(etcd, prefix)
    await node.keeper.acquire()
    put_if, replaced = etcd.put_if, list[int]()

    async def put_while_letting_go(*words: Any) -> Any:
        if CONFLICT in node.reasons.now:
            replaced.append(node.keeper.own.etcd_lease)
            node.keeper.let_go()
        return await put_if(*words)

    monkeypatch.setattr(etcd, "put_if", put_while_letting_go)
    async with node.running():
        for _ in range(COPIES_TOLERATED + 1):
            seen = node.keeper.own.foreign_puts
            await twin.keeper.acquire()
            await until(lambda seen=seen: node.keeper.own.foreign_puts > seen)  # type: ignore[misc]
        await until(lambda: replaced and node.keeper.own.etcd_lease not in replaced)
    assert node.keeper.own.state is LeaseState.RELEASED


@pytest.mark.parametrize("task", ["_renew", "_advertise"])
async def test_what_ends_a_task_ends_the_keeper(
    etcd: Etcd, prefix: str, monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
    """Or nobody would renew, and nobody would know."""
    node = Node(etcd, prefix, margin=LEASE_TTL_SECONDS)
    await node.keeper.acquire()

    async def fail(*_: object) -> bool:
        raise AssertionError("a defect of ours")

    monkeypatch.setattr(node.keeper, task, fail)
    node.keeper.advertise(IPv4Address("192.0.2.99"))
    with pytest.raises(AssertionError, match="a defect of ours"):
        await asyncio.wait_for(node.keeper.run(node.on_change), 10)


async def test_a_put_that_is_not_permitted_leaves_no_etcd_lease_behind(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyflannel.control.lease_writer.RETRY_SECONDS", 0.01)
    with etcd_on_loopback(folder, flags=["--bcrypt-cost", "4"]) as cluster:
        cluster.run("role", "add", "reader")
        cluster.run("role", "grant-permission", "--prefix=true", "reader", "read", "/")
        for user, role in (("root", "root"), ("reader", "reader")):
            cluster.run("user", "add", f"{user}:secret")
            cluster.run("user", "grant-role", user, role)
        cluster.run("auth", "enable")
        cluster.ctl = ("--user", "root:secret")
        etcd = Etcd(cluster.endpoints, username="reader", password="secret")
        node = Node(etcd, "/n")
        starting = asyncio.ensure_future(node.keeper.acquire())
        await until(lambda: len(node.reasons.ever) > 3)
        assert "permission denied" in node.reasons.now[NO_LEASE]
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        await etcd.close()
        found = cluster.run("lease", "list").splitlines()
        assert len(found) <= 2, found  # a headline, and the one under way


async def test_a_release_does_not_wait_for_an_etcd_that_refuses_us(
    cluster: EtcdCluster, etcd: Etcd, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    member = Etcd(cluster.endpoints)
    node = Node(member, prefix)
    await node.keeper.acquire()
    await member.close()
    member._session.refused("wrong password")
    started = time.monotonic()
    await node.keeper.release()
    assert time.monotonic() - started < REFUSED_SECONDS / 2
    assert "is not given back, it ends by itself: etcd does not answer in time" in caplog.text
    assert await entry(etcd, node.key) is not None
    await member.close()
