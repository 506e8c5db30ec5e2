"""`--public-ip` of a host behind NAT: it sends from its own address, peers send to the public one.

c1 -- h1 192.168.77.11 -- switch, NAT: 198.51.100.7 is h1 for h2 -- h2 (kernel) 192.168.77.12 -- c2
"""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import IPv4Network

import pytest

from tests.lab.hosts import (
    SWITCH_ADDRESS,
    Lab,
    container_address,
    is_reached,
    lab,
    wait_until,
)
from tests.lab.kernel_node import program_kernel_node, start_kernel_node
from tests.lab.require import require_program, require_root

PUBLIC = "198.51.100.7"
KERNEL_SUBNET = IPv4Network("10.244.200.0/24")


@pytest.fixture
def made() -> Iterator[Lab]:
    require_root()
    for program in ("ip", "bridge", "ethtool", "etcd", "etcdctl", "ping", "nft"):
        require_program(program)
    with lab(2) as made:
        yield made


def _translate(made: Lab) -> None:
    """Let the switch route what the hosts send each other, and translate h1's address."""
    h1, h2 = made.hosts
    made.switch.exec("sysctl", "-qw", "net.ipv4.conf.br0.send_redirects=0")
    made.switch.exec("sysctl", "-qw", "net.ipv4.conf.all.send_redirects=0")
    h1.ip("route", "add", f"{h2.address}/32", "via", str(SWITCH_ADDRESS))
    h2.ip("route", "add", PUBLIC, "via", str(SWITCH_ADDRESS))
    rules = (
        "table ip translate {"
        "chain in { type nat hook prerouting priority dstnat;"
        f" ip daddr {PUBLIC} dnat to {h1.address}; }}\n"
        "chain out { type nat hook postrouting priority srcnat;"
        f" ip saddr {h1.address} ip daddr {h2.address} snat to {PUBLIC}; }}\n"
        "}"
    )
    made.switch.exec("nft", rules)


def test_host_behind_nat(made: Lab) -> None:
    made.put_config()
    _translate(made)
    h1, h2 = made.hosts
    made.start_daemon(h1, "--public-ip", PUBLIC)
    start_kernel_node(made, h2, KERNEL_SUBNET, "0a:00:00:00:00:03")
    program_kernel_node(made, h2)
    containers = [made.add_container(host) for host in (h1, h2)]
    wait_until(lambda: str(KERNEL_SUBNET) in h1.ip("route"), "the route to the kernel node")
    (lease,) = [x for key, x in made.leases().items() if not key.startswith("10.244.200.")]
    assert lease["PublicIP"] == PUBLIC
    assert PUBLIC in h2.exec("bridge", "fdb", "show", "dev", "flannel.1")
    assert is_reached(containers[0], container_address(h2))
    assert is_reached(containers[1], container_address(h1))
    (line,) = [x for x in h1.log.read_text().splitlines() if "Chose eth0" in x]
    assert f"sending from {h1.address}" in line
    assert f"peers are told {PUBLIC} (--public-ip)" in line
