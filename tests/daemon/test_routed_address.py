"""An underlay address that no link has, as on hosts that announce it by BGP: routes lead to it.

c1 -- h1 (ours) eth0 192.168.77.11 --+-- switch --+-- eth0 192.168.77.12 h2 (kernel) -- c2
         lo 198.51.100.1                                lo 198.51.100.2
"""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Network

import pytest

from tests.lab.hosts import Lab, container_address, is_reached, lab, wait_until
from tests.lab.kernel_node import program_kernel_node, start_kernel_node
from tests.lab.require import require_program, require_root

ROUTED = IPv4Address("198.51.100.1"), IPv4Address("198.51.100.2")
LONGEST = 65535 - 50
KERNEL_SUBNET = IPv4Network("10.244.200.0/24")


@pytest.fixture
def made() -> Iterator[Lab]:
    require_root()
    for program in ("ip", "bridge", "ethtool", "etcd", "etcdctl", "ping"):
        require_program(program)
    with lab(2) as made:
        for host, other, address in zip(made.hosts, made.hosts[::-1], ROUTED):
            host.ip("addr", "add", str(address), "dev", "lo")
            other.ip("route", "add", str(address), "via", str(host.address))
            host.iface = "lo"
        for host, address in zip(made.hosts, ROUTED):
            host.address = address
        yield made


def test_packets_leave_by_the_interface_that_the_routes_name(made: Lab) -> None:
    made.put_config()
    ours, kernel = made.hosts
    made.start_daemon(ours)
    assert ours.subnet_env()["FLANNEL_MTU"] == str(LONGEST)
    start_kernel_node(made, kernel, KERNEL_SUBNET, "0a:00:00:00:00:03", mtu=LONGEST)
    program_kernel_node(made, kernel)
    containers = [made.add_container(host) for host in made.hosts]
    wait_until(lambda: str(KERNEL_SUBNET) in ours.ip("route"), "the route to the kernel node")
    assert is_reached(containers[0], container_address(kernel))
    assert is_reached(containers[1], container_address(ours))
    full_size = ("-M", "do", "-s", str(LONGEST - 28))
    assert is_reached(containers[0], container_address(kernel), *full_size)
