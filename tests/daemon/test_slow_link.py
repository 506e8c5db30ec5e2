"""A link that is slower than its host: h1 (ours) eth1 --- 100 Mbit/s --- eth1 h2 (the kernel's).

What a local sender has in flight must stand in its TUN queue, not in the device's, where all that
leaves the host would wait for it. What leaves by another link, to h3 (the kernel's) on eth0, must
not wait for it either.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from ipaddress import IPv4Network

import pytest

from tests.lab.hosts import UNDERLAYS, Host, Lab, ping, wait_until
from tests.lab.iperf import serve_iperf3
from tests.lab.kernel_node import program_kernel_node, start_kernel_node
from tests.lab.require import require_program, require_root

pytestmark = pytest.mark.alone

SLOW, FAST = IPv4Network("10.244.200.0/24"), IPv4Network("10.244.201.0/24")
RATE = 100e6
STANDING_BYTES = 512 << 10
"""A send socket's least room and a super-packet on its way, for each of a few flows."""
WINDOWS, WINDOW_SECONDS = 40, 0.5
CONNECTIONS = 10
"""One may share a TUN queue, or a source port, with what fills the slow link; not all of them."""


@pytest.fixture
def made() -> Iterator[Lab]:
    require_root()
    for program in ("ip", "tc", "bridge", "ethtool", "etcd", "etcdctl", "iperf3", "ping"):
        require_program(program)
    made = Lab(UNDERLAYS["wire-100m"])
    try:
        made.start_switch()
        ours, slow, fast = (made.add_host() for _ in range(3))
        by_switch = ours.address
        made.cable(ours, slow)
        fast.ip("route", "add", str(ours.address), "via", str(by_switch))
        made.start_etcd()
        made.put_config()
        made.start_daemon(ours, "--source-ports=64")
        start_kernel_node(made, slow, SLOW, "0a:00:00:00:00:03")
        start_kernel_node(made, fast, FAST, "0a:00:00:00:00:04")
        for host in (slow, fast):
            program_kernel_node(made, host)
            serve_iperf3(host, made.folder / f"iperf3-{host.name}.log")
        wait_until(lambda: all(ping(ours, x[0]) for x in (SLOW, FAST)), "both are reached")
        yield made
    finally:
        made.close()


def _fill(made: Lab, *flags: str) -> Host:
    """Send to the host behind the slow link, which is full when this returns; return who sends."""
    host = made.hosts[0]
    # fmt: off
    host.start("iperf3", "-c", str(SLOW[0]), "-t", "60", *flags, log=host.folder / "iperf3.log")
    # fmt: on
    wait_until(lambda: _queue(host)[0] > 0, "the link is full")
    # As much as the link takes in a second.
    before = _queue(host)[1]
    wait_until(lambda: _queue(host)[1] - before > RATE / 8, "the window has grown")
    return host


def _queue(host: Host) -> tuple[int, int]:
    """Return how many bytes stand before the link, and how many were sent."""
    (found,) = json.loads(host.exec("tc", "-s", "-j", "qdisc", "show", "dev", host.iface, "root"))
    return found["backlog"], found["bytes"]


@pytest.mark.parametrize("flags", [("-P", "1"), ("-P", "4"), ("-u", "-b", "1G", "-l", "1200")])
def test_bulk_does_not_stand_before_all_else(made: Lab, flags: tuple[str, ...]) -> None:
    host = _fill(made, *flags)
    seen = [_window(host)]
    while not _is_short_and_full(*seen[-1]):
        assert len(seen) < WINDOWS, seen
        seen.append(_window(host))


@pytest.mark.parametrize("flags", [("-P", "16"), ("-u", "-b", "50M", "-l", "1200", "-P", "4")])
def test_another_link_does_not_wait_for_it(made: Lab, flags: tuple[str, ...]) -> None:
    host = _fill(made, *flags)
    rates = [_rate(host)]
    while rates[-1] < 2 * RATE:
        assert len(rates) < CONNECTIONS, rates
        rates.append(_rate(host))
    assert _queue(host)[0] > 0, "the slow link is not full any more"


def _rate(host: Host) -> float:
    """Return bits a second of a new connection to the host behind the fast link."""
    said = host.exec("iperf3", "-J", "-c", str(FAST[0]), "-t", "1", check=False)
    received = json.loads(said)["end"].get("sum_received", {})
    return float(received.get("bits_per_second", 0))


def _window(host: Host) -> tuple[int, float]:
    """Return how many bytes stood before the link at most for a while, and bits sent a second."""
    (standing, before), began = _queue(host), time.monotonic()
    while time.monotonic() < began + WINDOW_SECONDS:
        standing = max(standing, _queue(host)[0])
    return standing, (_queue(host)[1] - before) * 8 / (time.monotonic() - began)


def _is_short_and_full(standing: int, rate: float) -> bool:
    """Whether the queue was short and the link as full as ever.

    While the daemon has no core the link runs dry, after which the queue may be longer for a while.
    """
    return standing < STANDING_BYTES and rate > 0.8 * RATE
