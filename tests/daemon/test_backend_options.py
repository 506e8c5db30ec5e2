"""What `Backend` can say besides its type: DirectRouting, VNI, Port, MTU, Learning.

c1 -- h1 (ours) ---+
c2 -- h2 (ours) ---+-- switch, etcd; its address is everybody's gateway
c3 -- h3 (kernel) -+
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from ipaddress import IPv4Network

import pytest

from tests.lab.hosts import (
    NETWORK,
    PREFIX,
    SWITCH_ADDRESS,
    Host,
    Lab,
    container_address,
    is_reached,
    lab,
    wait_until,
)
from tests.lab.kernel_node import program_kernel_node, start_kernel_node
from tests.lab.require import require_program, require_root

DIRECT = f'{{{NETWORK},"Backend":{{"Type":"vxlan","DirectRouting":true}}}}'
FAR = "10.244.201.0/24"


@pytest.fixture
def made() -> Iterator[Lab]:
    require_root()
    for program in ("ip", "bridge", "ethtool", "etcd", "etcdctl", "ping", "ss"):
        require_program(program)
    with lab(3) as made:
        yield made


def _subnet(host: Host) -> IPv4Network:
    return IPv4Network(host.subnet_env()["FLANNEL_SUBNET"], strict=False)


def _encapsulated(host: Host) -> int:
    """Return how many packets the host gave to its flannel device."""
    link = json.loads(host.ip("-s", "-j", "link", "show", "flannel.1"))[0]
    return int(link["stats64"]["tx"]["packets"])


def test_direct_routing(made: Lab) -> None:
    made.put_config(DIRECT)
    h1, h2, _ = made.hosts
    made.etcdctl(
        "put",
        f"{PREFIX}/subnets/{FAR.replace('/', '-')}",
        '{"PublicIP":"192.0.2.9","BackendType":"vxlan",'
        '"BackendData":{"VNI":1,"VtepMAC":"0a:00:00:00:00:08"}}',
    )
    first = made.start_daemon(h1, "--iptables-resync", "1")
    made.start_daemon(h2, "--iptables-resync", "600")
    containers = [made.add_container(host) for host in (h1, h2)]
    direct = f"{_subnet(h2)} via {h2.address} dev eth0 \n"
    encapsulated = f"{_subnet(h2)} via {_subnet(h2)[0]} dev flannel.1 onlink \n"
    wait_until(lambda: direct in h1.ip("route"), "the direct route")
    assert f"{FAR} via {FAR.split('/')[0]} dev flannel.1 onlink" in h1.ip("route")

    before = _encapsulated(h1)
    assert is_reached(containers[0], container_address(h2))
    assert _encapsulated(h1) == before

    # The other side may see things differently: what it encapsulates is accepted all the same.
    far_side = (f"{h1.address}/32", "via", str(SWITCH_ADDRESS), "dev", "eth0")
    back = f"{_subnet(h1)} via {_subnet(h1)[0]} dev flannel.1 onlink \n"
    h2.ip("route", "add", *far_side)
    wait_until(lambda: back in h2.ip("route"), "the other side encapsulates", 5)
    before = _encapsulated(h2)
    assert is_reached(containers[0], container_address(h2))
    assert _encapsulated(h2) > before
    assert direct in h1.ip("route")
    h2.ip("route", "del", *far_side)

    detour = (f"{h2.address}/32", "via", str(SWITCH_ADDRESS), "dev", "eth0")
    h1.ip("route", "add", *detour)
    wait_until(lambda: encapsulated in h1.ip("route"), "the peer is behind a gateway now", 5)
    assert direct not in h1.ip("route")
    assert is_reached(containers[0], container_address(h2))
    h1.ip("route", "del", *detour)
    wait_until(lambda: direct in h1.ip("route"), "the peer is on our link again", 5)
    h1.ip("link", "set", "eth0", "down")
    h1.ip("link", "set", "eth0", "up")
    h1.ip("route", "add", "default", "via", str(SWITCH_ADDRESS))
    wait_until(lambda: direct in h1.ip("route"), "the route is back after the link was down", 5)

    h1.stop(first)
    (key,) = [key for key in made.leases() if key.startswith(str(_subnet(h2)[0]))]
    h2.stop(0)
    made.etcdctl("del", f"{PREFIX}/subnets/{key}")
    assert direct in h1.ip("route")
    made.start_daemon(h1)
    assert direct not in h1.ip("route")


def test_vni_port_and_mtu_with_a_kernel_node_as_in_the_golden_files(made: Lab) -> None:
    made.put_config(
        '{"Network":"10.245.0.0/16","SubnetLen":26,"SubnetMin":"10.245.10.0",'
        '"SubnetMax":"10.245.20.0","Backend":{"Type":"vxlan","VNI":42,"Port":4789,"MTU":1400,'
        '"Learning":true}}'
    )
    h1, _, kernel = made.hosts
    made.start_daemon(h1)
    start_kernel_node(
        made,
        kernel,
        IPv4Network("10.245.16.64/26"),
        "0a:00:00:00:00:03",
        vni=42,
        port=4789,
        mtu=1350,
    )
    program_kernel_node(made, kernel, vni=42)
    ours, theirs = made.add_container(h1), made.add_container(kernel)
    wait_until(
        lambda: "10.245.16.64/26 via 10.245.16.64 dev flannel.42 onlink" in h1.ip("route"),
        "the route to the kernel node",
    )
    assert h1.subnet_env()["FLANNEL_MTU"] == "1350"
    assert json.loads(h1.ip("-j", "link", "show", "flannel.42"))[0]["mtu"] == 1350
    assert "0.0.0.0:4789" in h1.exec("ss", "-lun")
    assert is_reached(ours, container_address(kernel), "-M", "do", "-s", "1322")
    assert is_reached(theirs, container_address(h1), "-M", "do", "-s", "1322")
    (note,) = [x for x in h1.log.read_text().splitlines() if "Learning is ignored" in x]
    assert note.startswith("W")


def test_mtu_above_the_links_is_clamped(made: Lab) -> None:
    made.put_config('{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan","MTU":9000}}')
    host = made.hosts[0]
    made.start_daemon(host)
    assert host.subnet_env()["FLANNEL_MTU"] == "1450"
    assert json.loads(host.ip("-j", "link", "show", "flannel.1"))[0]["mtu"] == 1450
    (warning,) = [x for x in host.log.read_text().splitlines() if "Backend.MTU 9000" in x]
    assert warning.startswith("W")
