"""Nothing that becomes of the network to etcd, of its store or of its users stops a packet.

Each test sends 100 packets a second while it does something to etcd, and wants every one answered,
and a new peer in the routes of both nodes within 5 s of etcd being well. The last test looks at the
cost of all that. tests/lab/faults.py draws the topology.
"""

from __future__ import annotations

import threading

import pytest

from tests.lab.etcd import SUBNETS
from tests.lab.faults import CPU_SHARE, FOLLOW_SECONDS, Cpu, Faults, cut
from tests.lab.hosts import wait_until

pytestmark = pytest.mark.slow


def test_the_nodes_are_cut_off(faults: Faults) -> None:
    addresses = [str(host.address) for host in faults.etcds]
    with faults.stream() as more:
        with cut(faults.nodes[0], *addresses), cut(faults.nodes[1], *addresses):
            with faults.noticed():
                more(100)
            more(200)
        faults.followed()


def test_one_member_is_cut_off_from_the_others(faults: Faults) -> None:
    """Clients still reach it, but it can answer nothing that needs a quorum."""
    member = faults.etcds[0]
    others = [str(host.address) for host in faults.etcds[1:]]
    with faults.stream() as more:
        with cut(member, *others):
            more(600)
            subnet = faults.put_peer(not_at=faults.cluster.members[0])
            faults.wait_for_route(subnet, seconds=10)
        faults.followed()


def test_history_is_compacted_while_a_node_is_away(faults: Faults) -> None:
    node, addresses = faults.nodes[0], [str(host.address) for host in faults.etcds]
    with faults.stream():
        with cut(node, *addresses), faults.noticed(node):
            subnets = [faults.put_peer() for _ in range(3)]
            faults.cluster.run("compaction", str(faults.cluster.revision()))
        for subnet in subnets:
            faults.wait_for_route(subnet, node)
        faults.followed()


def test_etcd_stutters(faults: Faults) -> None:
    """Frozen for a second, awake for a tenth of one, again and again."""
    ended = threading.Event()

    def stutter() -> None:
        while not ended.is_set():
            for member in faults.cluster.members:
                member.freeze()
            ended.wait(1)
            for member in faults.cluster.members:
                member.thaw()
            ended.wait(0.1)

    stuttering = threading.Thread(target=stutter)
    with faults.stream() as more:
        stuttering.start()
        more(800)
        ended.set()
        stuttering.join()
        faults.followed()


def test_the_store_is_restored_from_a_snapshot(faults: Faults) -> None:
    faults.cluster.save(faults.lab.folder / "backup")
    with faults.stream():
        newer = faults.put_peer()
        faults.wait_for_route(newer)
        with faults.noticed(text="etcd was wiped or rolled back"):
            faults.cluster.restore(faults.lab.folder / "backup")
            faults.cluster.start()
        faults.followed()
    for host in faults.nodes:
        assert faults.has_route(host, newer)


def test_the_store_is_wiped(faults: Faults) -> None:
    with faults.stream():
        with faults.noticed(text="etcd was wiped or rolled back"):
            faults.cluster.wipe()
            faults.cluster.start()
            faults.provision()
        faults.followed()
        for host in faults.nodes:
            subnet = host.subnet_env()["FLANNEL_SUBNET"].replace(".1/", ".0-")
            wait_until(
                lambda subnet=subnet: any(  # type: ignore[misc]  # bound at once
                    kv["key"] for kv in faults.cluster.kvs(SUBNETS + subnet)
                ),
                f"the lease of {host.name} is back",
                FOLLOW_SECONDS,
            )


def test_a_wrong_password_is_one_sentence_and_no_noise(faults: Faults) -> None:
    """On a host of its own, for longer than an etcd that is merely away is retried."""
    host = faults.etcds[0]
    # fmt: off
    index = faults.lab.start_daemon(
        host, "--etcd-endpoints", ",".join(faults.cluster.endpoints),
        "--etcd-username", "root", "--etcd-password", "guess", wait=False,
    )
    # fmt: on
    with faults.stream() as more:
        wait_until(lambda: host.log.exists() and "refuses us" in host.log.read_text(), "a line")
        more(500)
    (line,) = host.log.read_text().splitlines()
    assert line.startswith("E")
    assert line.endswith("wrong --etcd-username or --etcd-password")
    assert host.stop(index) == 0


def test_all_that_cost_a_small_part_of_a_core(cpu: Cpu) -> None:
    shares = cpu.worst_shares()
    assert 0 < min(shares) <= max(shares) < CPU_SHARE, shares
