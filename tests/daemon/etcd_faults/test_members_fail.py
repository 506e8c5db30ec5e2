"""Nothing that the members of etcd do stops a packet.

Each test sends 100 packets a second while it does something to etcd, and wants every one answered,
and a new peer in the routes of both nodes within 5 s of etcd being well. The last test looks at the
cost of all that. tests/lab/faults.py draws the topology.
"""

from __future__ import annotations

import pytest

from tests.lab.faults import CPU_SHARE, FOLLOW_SECONDS, Cpu, Faults
from tests.lab.hosts import wait_until

pytestmark = pytest.mark.slow


def test_the_member_in_use_is_killed(faults: Faults) -> None:
    member = faults.cluster.members[0]
    with faults.stream() as more:
        with faults.noticed(text="leaving an etcd endpoint"):
            member.kill()
        faults.followed()
        for host in faults.nodes:
            status = faults.status(host)
            assert status["state"] == "well"
            assert status["endpoint"] in faults.cluster.endpoints[1:]
            # If it led the others, a word about their new leader may have come last.
            assert status["last_error"].startswith(tuple(faults.cluster.endpoints))
            left = [x for x in host.log.read_text().splitlines() if "leaving an etcd endpoint" in x]
            assert any(f": {member.client_url}: " in line for line in left), left
        more(100)
        faults.cluster.start(member)
        faults.followed()


def test_all_members_are_killed(faults: Faults) -> None:
    with faults.stream() as more:
        with faults.noticed():
            for member in faults.cluster.members:
                member.kill()
        more(500)
        for host in faults.nodes:
            status = faults.status(host)
            assert status["state"] == "lost"
            assert not status["view"]["is_following"]
            assert status["view"]["age_seconds"] > 4
            assert status["silence_seconds"] > 4
            assert "Connection refused" in status["last_error"]
            wait_until(
                lambda host=host: faults.status(host)["last_error_seconds"] < 2,  # type: ignore[misc]  # bound at once
                "it goes on trying",
            )
        faults.cluster.start()
        faults.followed()
        for host in faults.nodes:
            status = faults.status(host)
            assert status["state"] == "well"
            assert status["view"]["is_following"]
            assert status["revision"] >= status["view"]["revision"]
            wait_until(
                lambda host=host: faults.status(host)["view"]["age_seconds"] < 6,  # type: ignore[misc]  # bound at once
                "the view is young",
            )


def test_all_members_hang(faults: Faults) -> None:
    with faults.stream() as more:
        with faults.noticed():
            for member in faults.cluster.members:
                member.freeze()
        more(200)
        for member in faults.cluster.members:
            member.thaw()
        faults.followed()


def test_the_member_in_use_hangs(faults: Faults) -> None:
    """Each in turn, so that whichever a node uses is among them."""
    for member in faults.cluster.members:
        with faults.stream():
            member.freeze()
            try:
                subnet = faults.put_peer(not_at=member)
                # Up to 5 s until the next probe, and 3 s that it waits for its answer.
                faults.wait_for_route(subnet, seconds=5 + 3 + FOLLOW_SECONDS)
            finally:
                member.thaw()


def test_the_leader_changes(faults: Faults) -> None:
    with faults.stream() as more:
        leader = faults.cluster.leader()
        leader.kill()
        more(200)
        faults.followed()
        faults.cluster.start(leader)
        faults.followed()


def test_the_quorum_is_lost(faults: Faults) -> None:
    with faults.stream() as more:
        with faults.noticed():
            for member in faults.cluster.members[1:]:
                member.kill()
        more(300)
        faults.cluster.start(*faults.cluster.members[1:])
        faults.followed()


def test_all_that_cost_a_small_part_of_a_core(cpu: Cpu) -> None:
    shares = cpu.worst_shares()
    assert 0 < min(shares) <= max(shares) < CPU_SHARE, shares
