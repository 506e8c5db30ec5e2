"""A peer that is down is nobody else's concern: h1 (ours), h2 (the kernel's), h3 (the same, down).

The kernel keeps what is sent to a neighbour while it asks for its MAC, for three seconds each time.
It stands in our send sockets, which must not be full of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from ipaddress import IPv4Network

import pytest

from tests.lab.hosts import Lab, ping, wait_until
from tests.lab.kernel_node import program_kernel_node, start_kernel_node
from tests.lab.require import require_program, require_root

pytestmark = pytest.mark.alone

SUBNETS = (IPv4Network("10.244.200.0/24"), IPv4Network("10.244.201.0/24"))
LIMIT_MS = 1500.0
"""Less than the kernel asks for, more than a socket may be full until it is seen to be stuck."""


@pytest.fixture(params=["0", "auto"])
def made(request: pytest.FixtureRequest) -> Iterator[Lab]:
    require_root()
    for program in ("ip", "bridge", "ethtool", "etcd", "etcdctl", "ping"):
        require_program(program)
    made = Lab()
    try:
        made.start_switch()
        ours, *kernel = (made.add_host() for _ in range(3))
        made.start_etcd()
        made.put_config()
        made.start_daemon(ours, "--workers", request.param)
        for number, (host, subnet) in enumerate(zip(kernel, SUBNETS)):
            start_kernel_node(made, host, subnet, f"0a:00:00:00:00:0{number}")
        for host in kernel:
            program_kernel_node(made, host)
        wait_until(lambda: all(ping(ours, subnet[0]) for subnet in SUBNETS), "both are reached")
        yield made
    finally:
        made.close()


def test_what_waits_for_a_dead_peer_stops_nobody_else(made: Lab) -> None:
    ours, _, dead = made.hosts
    dead.ip("link", "set", "eth0", "down")
    ours.ip("neigh", "flush", "to", str(dead.address))
    log = made.folder / "ping.log"
    ours.start("ping", "-q", "-i", "0.005", "-s", "1200", str(SUBNETS[1][0]), log=log)
    neighbour = ("neigh", "show", str(dead.address))
    wait_until(lambda: "INCOMPLETE" in ours.ip(*neighbour), "the kernel asks for its MAC")
    said = ours.exec("ping", "-q", "-i", "0.05", "-c", "100", str(SUBNETS[0][0]))
    (longest,) = re.findall(r"rtt [^=]*= [\d.]+/[\d.]+/([\d.]+)/", said)
    assert float(longest) < LIMIT_MS, said
