"""A link that is slower than its host: h1 (ours) eth1 --- 100 Mbit/s --- eth1 h2 (the kernel's).

What a local sender has in flight must stand in its TUN queue, not in the device's, where all that
leaves the host would wait for it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from ipaddress import IPv4Network

import pytest

from tests.lab.hosts import UNDERLAYS, Host, Lab, ping, wait_until
from tests.lab.kernel_node import program_kernel_node, start_kernel_node
from tests.lab.require import require_program, require_root

pytestmark = pytest.mark.alone

KERNEL_SUBNET = IPv4Network("10.244.200.0/24")
RATE = 100e6
STANDING_BYTES = 512 << 10
"""A send socket's least room and a super-packet on its way, for each of a few flows."""
SECONDS = 3.0


@pytest.fixture
def made() -> Iterator[Lab]:
    require_root()
    for program in ("ip", "tc", "bridge", "ethtool", "etcd", "etcdctl", "iperf3", "ping"):
        require_program(program)
    made = Lab(UNDERLAYS["wire-100m"])
    try:
        made.start_switch()
        made.cable(made.add_host(), made.add_host())
        made.start_etcd()
        made.put_config()
        ours, kernel = made.hosts
        made.start_daemon(ours)
        start_kernel_node(made, kernel, KERNEL_SUBNET, "0a:00:00:00:00:03")
        program_kernel_node(made, kernel)
        wait_until(lambda: ping(ours, KERNEL_SUBNET[0]), "the kernel node is reached")
        kernel.start("iperf3", "-s", log=made.folder / "iperf3.log")
        wait_until(lambda: ":5201" in kernel.exec("ss", "-ltn"), "iperf3 listens")
        yield made
    finally:
        made.close()


def _queue(host: Host) -> tuple[int, int]:
    """Return how many bytes stand before the link, and how many were sent."""
    (found,) = json.loads(host.exec("tc", "-s", "-j", "qdisc", "show", "dev", host.iface, "root"))
    return found["backlog"], found["bytes"]


@pytest.mark.parametrize("flags", [("-P", "1"), ("-P", "4"), ("-u", "-b", "1G", "-l", "1200")])
def test_bulk_does_not_stand_before_all_else(made: Lab, flags: tuple[str, ...]) -> None:
    host = made.hosts[0]
    # fmt: off
    host.start("iperf3", "-c", str(KERNEL_SUBNET[0]), "-t", str(2 * SECONDS), *flags,
               log=host.folder / "iperf3.log")
    # fmt: on
    wait_until(lambda: _queue(host)[0] > 0, "the link is full")
    time.sleep(1)  # until the window has grown
    standing, (_, before), began = [], _queue(host), time.monotonic()
    while time.monotonic() < began + SECONDS:
        standing.append(_queue(host)[0])
    sent, seconds = _queue(host)[1] - before, time.monotonic() - began
    assert max(standing) < STANDING_BYTES
    # The link is as full as ever.
    assert sent * 8 > 0.8 * RATE * seconds
