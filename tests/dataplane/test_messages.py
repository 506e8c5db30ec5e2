"""Messages of many datagrams: each is checked as if it had come alone, by the twin's word.

A sender on a virtual link hands over one message with UDP_SEGMENT, and it arrives as one.
"""

from __future__ import annotations

import random
import select
import socket
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

import pytest

from pyflannel.dataplane.fastpath import PUSH_BYTES, AntiSpoofing
from pyflannel.dataplane.offload import EVERY_OFFLOAD
from pyflannel.dataplane.route import Route, Vni
from tests.dataplane.packets import Packet, body
from tests.dataplane.path import MACS, NETWORKS, PORT, SUBNETS, Node, by_flow, cabled, inside
from tests.dataplane.twin import Twin
from tests.dataplane.twin_segments import TCP, UDP
from tests.lab.hosts import Host

MESSAGES = 150
SPOOFS = ("unknown_vtep", "vtep_mac", "inner_source")
SOL_UDP, UDP_SEGMENT = 17, 103


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[Host, Host]]:
    with cabled("veth-default") as made:
        yield made


def datagrams_of(rng: random.Random, family: int, peer: Twin) -> list[bytes]:
    """Datagrams of one stream and one size, some of them changed in any way."""
    source, destination = (subnet[7].packed for subnet in SUBNETS[family])
    packet = Packet(
        source=source,
        destination=destination,
        protocol=rng.choice([TCP, TCP, UDP]),
        ports=(rng.randrange(1000, 1010), 80),
        tos=rng.randrange(4),
    )
    size = rng.choice([9, 700, 1380])
    made = []
    for number in range(rng.randint(2, 40)):
        payload = body(size, rng.randrange(256))
        label = number if family == 4 else 0
        one = replace(packet, payload=payload, id=label, sequence=number * size)
        chance = rng.randrange(40)
        if chance == 0:
            one = replace(one, source=SUBNETS[family][1][9].packed)
        elif chance == 1:
            one = replace(one, tos=rng.randrange(4))
        encapsulated = peer.encapsulate(one.build())
        assert not isinstance(encapsulated, str)
        datagram = bytearray(encapsulated[0])
        if chance == 2:
            datagram[rng.randrange(PUSH_BYTES)] ^= 1 << rng.randrange(8)
        elif chance in (3, 4):
            datagram[PUSH_BYTES + rng.randrange(one.headers())] ^= 1 << rng.randrange(8)
        made.append(bytes(datagram))
    if rng.random() < 0.2:
        made[-1] = made[-1][: rng.randint(1, len(made[-1]))]
    return made


def send(sender: socket.socket, datagrams: list[bytes], tos: int) -> None:
    """Send datagrams of one size, the last one's may be less, as one message."""
    sender.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, tos)
    sender.setsockopt(SOL_UDP, UDP_SEGMENT, len(datagrams[0]))
    sender.send(b"".join(datagrams))


def receive(node: Node, packets: int, drops: int) -> list[bytes]:
    """Return what comes in until the node has had so many packets and, since it began, drops."""
    got: list[bytes] = []
    deadline = time.monotonic() + 30
    while len(got) < packets or sum(node.drops().values()) < drops:
        node.worker.turn()
        select.select([node.raw], [], [], 0.001)
        got += node.take()
        assert time.monotonic() < deadline, (len(got), packets, node.drops(), drops)
    return got


@pytest.mark.parametrize("mode", [AntiSpoofing.ENFORCE, AntiSpoofing.LOG], ids=str)
@pytest.mark.parametrize("family", [4, 6])
def test_each_datagram_of_a_message_is_checked(
    hosts: tuple[Host, Host], family: int, mode: AntiSpoofing
) -> None:
    here = hosts[0].address
    route, back = (Route(*one, here, PORT) for one in zip(SUBNETS[family], MACS))
    peer = Twin(Vni(1), MACS[0], NETWORKS[family], (back,))
    strict = Twin(Vni(1), MACS[1], NETWORKS[family], (route,))
    twin = replace(strict, mode=mode.name.lower())
    rng = random.Random(family)
    got, passed = [], []
    dropped: Counter[str] = Counter()
    suspects = 0
    with ExitStack() as closing:
        node = Node(hosts[1], 1, family, EVERY_OFFLOAD, mode)
        closing.callback(node.close)
        node.context.replace(route)
        with inside(hosts[0]):
            sender = closing.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        sender.connect((str(hosts[1].address), PORT))
        for _ in range(MESSAGES):
            datagrams, tos = datagrams_of(rng, family, peer), rng.randrange(4)
            send(sender, datagrams, tos)
            verdicts = [twin.decapsulate(one, here, tos) for one in datagrams]
            arriving = [one for one in verdicts if isinstance(one, bytes)]
            dropped.update(one for one in verdicts if isinstance(one, str))
            suspects += sum(strict.decapsulate(one, here, tos) in SPOOFS for one in datagrams)
            got += receive(node, len(arriving), dropped.total())
            passed += arriving
        counters = node.context.counters()
        assert +Counter(node.drops()) == dropped
    assert by_flow(got) == by_flow(passed)
    assert suspects > 20
    assert sum(counters.spoofed.values()) == (suspects if mode is AntiSpoofing.LOG else 0)
    assert counters.receives == MESSAGES
    assert 4 * counters.tun_writes < len(got)
