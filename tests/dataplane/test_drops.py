"""Every packet is delivered, or counted once as dropped: for the node, and for the peer it is of.

The host refuses packets in the midst of a transfer, at either end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import pytest

from pyflannel.dataplane.fastpath import Context, Counters
from pyflannel.dataplane.forwarder import Workers
from pyflannel.dataplane.offload import EVERY_OFFLOAD, NO_OFFLOAD, Offload
from tests.dataplane.path import TOGETHER, Node, cabled, expected_of, inputs
from tests.lab.hosts import Host
from tests.lab.require import require_program

Hosts = tuple[Host, Host]
PERIOD = 5
"""So many lots of packets from one refusal to the next."""


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with cabled("wire-nocsum") as made:
        yield made


@contextmanager
def some_denied(hosts: Hosts) -> Iterator[None]:
    require_program("iptables")
    third = ("-m", "statistic", "--mode", "nth", "--every", "3", "--packet", "0")
    rule = ("OUTPUT", "-p", "udp", *third, "-j", "DROP")
    hosts[0].exec("iptables", "-A", *rule)
    yield
    hosts[0].exec("iptables", "-D", *rule)


@contextmanager
def narrow_link(hosts: Hosts) -> Iterator[None]:
    hosts[0].ip("link", "set", hosts[0].iface, "mtu", "1000")
    yield
    hosts[0].ip("link", "set", hosts[0].iface, "mtu", "1500")


@contextmanager
def no_way(hosts: Hosts) -> Iterator[None]:
    hosts[0].ip("route", "add", "unreachable", str(hosts[1].address))
    yield
    hosts[0].ip("route", "del", "unreachable", str(hosts[1].address))


@contextmanager
def device_down(hosts: Hosts) -> Iterator[None]:
    hosts[1].ip("link", "set", "flannel.1", "down")
    yield
    hosts[1].ip("link", "set", "flannel.1", "up")


REFUSALS: list[tuple[Callable[[Hosts], AbstractContextManager[None]], str, str]] = [
    (some_denied, "send_denied", ""),
    (narrow_link, "", ""),
    (no_way, "send_unreachable", ""),
    (device_down, "", "tun_down"),
]


def dropped(counters: Counters) -> dict[str, int]:
    return {
        reason: count
        for reason, count in counters.drops.items()
        if count and reason not in ("encap_multicast", "encap_family")
    }


def of_the_peer(context: Context) -> tuple[int, int, int, int, int]:
    (peer,) = context.peers()
    return (
        peer.traffic.encap_packets,
        peer.traffic.encap_bytes,
        peer.traffic.decap_packets,
        peer.traffic.decap_bytes,
        peer.drops,
    )


def of_the_node(counters: Counters) -> tuple[int, int, int, int, int]:
    traffic, drops = counters.traffic, dropped(counters)
    return (
        traffic.encap_packets,
        traffic.encap_bytes,
        traffic.decap_packets,
        traffic.decap_bytes,
        sum(drops.values()),
    )


@pytest.mark.parametrize("offload", [NO_OFFLOAD, EVERY_OFFLOAD], ids=str)
def test_what_has_no_route_counts_as_the_packets_on_the_wire(
    hosts: Hosts, offload: Offload
) -> None:
    with ExitStack() as closing:
        node = Node(hosts[0], 0, 4, offload)
        closing.callback(node.close)
        for one in inputs(4):
            node.put(one)
        while node.worker.turn():
            pass
        expected = sum(map(len, expected_of(4)))
        assert dropped(node.context.counters()) == {"no_route": expected}


@pytest.mark.parametrize("offload", [NO_OFFLOAD, EVERY_OFFLOAD], ids=str)
@pytest.mark.parametrize("workers", [Workers.LOOP, Workers.AUTO], ids=str)
@pytest.mark.parametrize(("refusal", "at_sender", "at_receiver"), REFUSALS)
def test_what_is_refused_is_counted_once(
    hosts: Hosts,
    refusal: Callable[[Hosts], AbstractContextManager[None]],
    at_sender: str,
    at_receiver: str,
    workers: Workers,
    offload: Offload,
) -> None:
    with ExitStack() as closing:
        nodes = [Node(host, number, 4, offload) for number, host in enumerate(hosts)]
        for number, node in enumerate(nodes):
            closing.callback(node.close)
            node.route_to(1 - number, hosts[1 - number])
            node.start(workers)

        def counters() -> tuple[Counters, Counters]:
            for node in nodes if workers is Workers.LOOP else ():
                node.worker.turn()
            return nodes[0].context.counters(), nodes[1].context.counters()

        def wait_for(packets: int) -> None:
            deadline = time.monotonic() + 30
            while True:
                ours, theirs = map(of_the_node, counters())
                if ours[0] + ours[4] == packets and theirs[2] + theirs[4] == ours[0]:
                    return
                assert time.monotonic() < deadline, (packets, ours, theirs)
                time.sleep(0.001)

        expected = 0
        for lot, begin in enumerate(range(0, len(inputs(4)), TOGETHER)):
            with refusal(hosts) if lot % PERIOD == 1 else ExitStack():
                for one in inputs(4)[begin : begin + TOGETHER]:
                    nodes[0].put(one)
                expected += sum(map(len, expected_of(4)[begin : begin + TOGETHER]))
                wait_for(expected)
        ours, theirs = counters()
        assert set(dropped(ours)) == {at_sender} - {""}
        assert set(dropped(theirs)) == {at_receiver} - {""}
        if refusal is narrow_link and Offload.GSO in offload:
            assert ours.sends_unsegmented
        for node in nodes:
            assert of_the_peer(node.context) == of_the_node(node.context.counters())
