"""The whole way of packets between two nodes, on real TUNs, sockets and a wire.

    packet socket -> TUN -> worker -> UDP -> eth1 ---- eth1 -> UDP -> worker -> TUN -> packet socket
    h1, 10.5.1.0/24                                                   h2, 10.5.2.0/24

Where the TUN has no offload, the kernel itself cuts what is put into it: then it is the oracle too.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import reduce
from itertools import combinations
from operator import or_

import pytest

from pyflannel.dataplane.forwarder import Workers
from pyflannel.dataplane.offload import EVERY_OFFLOAD, NO_OFFLOAD, Offload
from tests.dataplane.path import (
    MACS,
    MTU,
    PACKET_VNET_HDR,
    PORT,
    SOL_PACKET,
    Input,
    Node,
    as_stream,
    cabled,
    check,
    inside,
    payload_of,
    put_all,
)
from tests.lab.hosts import Host

COMBINATIONS = [
    reduce(or_, chosen, NO_OFFLOAD)
    for count in range(len(Offload) + 1)
    for chosen in combinations(Offload, count)
]


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[Host, Host]]:
    with cabled("wire-nocsum") as made:
        yield made


def carry(hosts: tuple[Host, Host], family: int, offload: Offload, workers: Workers) -> list[bytes]:
    """Put every input in on the first host; what came out at the second."""
    with ExitStack() as closing:
        nodes = []
        for number, host in enumerate(hosts):
            nodes.append(Node(host, number, family, offload))
            closing.callback(nodes[-1].close)
        for number, node in enumerate(nodes):
            node.route_to(1 - number, hosts[1 - number])
            node.start(workers)

        def turn() -> None:
            for node in nodes if workers is Workers.LOOP else ():
                node.worker.turn()

        got = put_all(family, nodes[0].put, nodes[1], turn)
        assert not any(nodes[0].drops().values())
        if offload == EVERY_OFFLOAD:
            counters = nodes[1].context.counters()
            assert 2 * counters.tun_writes < len(got)
            assert 2 * counters.receives < len(got)
            assert 2 * nodes[0].context.counters().sends < len(got)
        return got


@pytest.mark.parametrize("offload", COMBINATIONS, ids=str)
def test_every_combination_of_offloads_gives_the_same_packets(
    hosts: tuple[Host, Host], offload: Offload
) -> None:
    check(carry(hosts, 4, offload, Workers.LOOP), 4)


@pytest.mark.parametrize("offload", [NO_OFFLOAD, EVERY_OFFLOAD], ids=str)
@pytest.mark.parametrize("workers", [Workers.ONE, Workers.TWO, Workers.AUTO], ids=str)
def test_every_choice_of_workers_gives_the_same_packets(
    hosts: tuple[Host, Host], workers: Workers, offload: Offload
) -> None:
    check(carry(hosts, 4, offload, workers), 4)


@pytest.mark.parametrize("offload", [NO_OFFLOAD, EVERY_OFFLOAD], ids=str)
def test_ipv6_inside_gives_the_same_packets(hosts: tuple[Host, Host], offload: Offload) -> None:
    check(carry(hosts, 6, offload, Workers.TWO), 6)


@pytest.mark.parametrize("offload", [Offload.GRO, EVERY_OFFLOAD], ids=str)
@pytest.mark.parametrize("family", [4, 6])
def test_super_packets_of_a_kernel_peer_on_a_virtual_link(offload: Offload, family: int) -> None:
    """Its vxlan device leaves checksums partial and sends up to 64 KB as one datagram.

    Of a TCP super-packet nothing tells where it was cut, so only the stream is the same.
    """
    with cabled("veth-default") as (kernel, ours), ExitStack() as closing:
        # fmt: off
        kernel.ip("link", "add", "flannel.1", "address", str(MACS[0]), "type", "vxlan", "id", "1",
                  "dev", kernel.iface, "local", str(kernel.address), "dstport", str(PORT),
                  "nolearning")
        # fmt: on
        kernel.ip("link", "set", "flannel.1", "mtu", str(MTU), "up")
        peer, device = str(ours.address), ("dev", "flannel.1")
        kernel.exec("bridge", "fdb", "replace", str(MACS[1]), *device, "dst", peer, "self")
        with inside(kernel):
            raw = closing.enter_context(socket.socket(socket.AF_PACKET, socket.SOCK_RAW))
            raw.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
            raw.bind(("flannel.1", 0))
        node = Node(ours, 1, family, offload)
        closing.callback(node.close)
        node.route_to(0, kernel)
        ethertype = 0x0800 if family == 4 else 0x86DD
        ethernet = MACS[1].octets + MACS[0].octets + ethertype.to_bytes(2, "big")

        def put(given: Input) -> None:
            vnet = given.vnet
            if vnet.flags:
                shift = len(ethernet)
                vnet = replace(
                    vnet, header_length=vnet.header_length + shift, start=vnet.start + shift
                )
            raw.send(vnet.pack()[:10] + ethernet + given.packet)

        got = put_all(family, put, node, node.worker.turn, payload_of)
        check(got, family, as_stream)
        assert max(map(len, got)) <= MTU
        assert 2 * node.context.counters().receives < len(got)
