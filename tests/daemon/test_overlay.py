"""Two of our nodes and one with the kernel's vxlan device in one overlay, on real packets.

c1 -- h1 (ours) ---+
c2 -- h2 (ours) ---+-- switch, etcd
c3 -- h3 (kernel) -+
"""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from functools import partial
from ipaddress import IPv4Network

import pytest

from tests.lab.hosts import (
    PREFIX,
    Host,
    Lab,
    Namespace,
    container_address,
    is_reached,
    lab,
    ping,
    wait_until,
)
from tests.lab.iperf import iperf3
from tests.lab.kernel_node import program_kernel_node, start_kernel_node
from tests.lab.require import require_program, require_root

KERNEL_SUBNET = IPv4Network("10.244.200.0/24")
KERNEL_MAC = "0a:00:00:00:00:03"


@pytest.fixture(scope="module")
def overlay() -> Iterator[Lab]:
    require_root()
    for program in ("ip", "bridge", "ethtool", "etcd", "etcdctl", "ping", "iperf3"):
        require_program(program)
    with lab(3) as made:
        made.put_config()
        for host in made.hosts[:2]:
            made.start_daemon(host)
        start_kernel_node(made, made.hosts[2], KERNEL_SUBNET, KERNEL_MAC)
        program_kernel_node(made, made.hosts[2])
        for host in made.hosts:
            made.add_container(host)
        base = f"{KERNEL_SUBNET} via {KERNEL_SUBNET[0]} dev flannel.1 onlink"
        for host in made.hosts[:2]:
            wait_until(partial(_has_route, host, base), "route to the kernel node")
        yield made


def _has_route(host: Host, line: str) -> bool:
    return line in host.ip("route")


def _containers(overlay: Lab) -> list[tuple[Host, Namespace]]:
    return [(host, host.container) for host in overlay.hosts if host.container is not None]


def test_every_container_reaches_every_other(overlay: Lab) -> None:
    pairs = [
        (source, target)
        for _, source in _containers(overlay)
        for target, other in _containers(overlay)
        if other is not source
    ]
    assert len(pairs) == 6
    for source, target in pairs:
        wait_until(partial(ping, source, container_address(target)), "a ping", 10)


def test_full_size_packet_with_df_passes_and_one_byte_more_does_not(overlay: Lab) -> None:
    for host, container in _containers(overlay)[:2]:
        target = container_address(overlay.hosts[2])
        assert is_reached(container, target, "-M", "do", "-s", "1422"), host.name
        assert not ping(container, target, "-M", "do", "-s", "1423")


def test_packet_ttl_is_decremented_by_the_two_hosts_only(overlay: Lab) -> None:
    (_, container), *_ = _containers(overlay)
    answer = container.exec("ping", "-c", "1", str(container_address(overlay.hosts[2])))
    assert "ttl=62" in answer


@pytest.mark.alone
@pytest.mark.parametrize("flags", [(), ("-R",), ("-u", "-b", "20M"), ("-u", "-b", "20M", "-R")])
def test_tcp_and_udp_both_ways_with_the_kernel_node(overlay: Lab, flags: tuple[str, ...]) -> None:
    (_, ours), _, (kernel_host, kernel) = _containers(overlay)
    end = iperf3(ours, kernel, container_address(kernel_host), overlay.folder, *flags)
    if "-u" in flags:
        assert end["sum"]["packets"] > 1000
        assert end["sum"]["lost_packets"] <= end["unread"]
    else:
        assert end["sum_received"]["bytes"] > 1_000_000


@pytest.mark.alone
def test_20000_packets_are_not_lost_and_the_kernel_counts_no_error(overlay: Lab) -> None:
    (_, ours), _, (kernel_host, _) = _containers(overlay)
    target = str(container_address(kernel_host))
    # At most ten at once, as whoever stalls has little room for answers.
    answer = ours.exec("ping", "-q", "-A", "-l", "10", "-c", "20000", target)
    assert "20000 received, 0% packet loss" in answer, answer
    statistics = json.loads(kernel_host.ip("-s", "-j", "link", "show", "flannel.1"))[0]["stats64"]
    assert statistics["rx"]["packets"] > 20000
    assert statistics["rx"]["errors"] == 0


def test_host_state_is_flannels(overlay: Lab) -> None:
    host = overlay.hosts[0]
    env = host.subnet_file.read_text()
    assert re.fullmatch(
        r"FLANNEL_NETWORK=10\.244\.0\.0/16\nFLANNEL_SUBNET=10\.244\.\d+\.1/24\n"
        r"FLANNEL_MTU=1450\nFLANNEL_IPMASQ=false\n",
        env,
    )
    subnet = IPv4Network(host.subnet_env()["FLANNEL_SUBNET"], strict=False)
    link = json.loads(host.ip("-d", "-j", "addr", "show", "flannel.1"))[0]
    assert link["mtu"] == 1450
    assert link["linkinfo"]["info_kind"] == "tun"
    (address,) = [x for x in link["addr_info"] if x["family"] == "inet"]
    assert (address["local"], address["prefixlen"]) == (str(subnet[0]), 32)
    assert address["scope"] == "global"


def test_lease_in_etcd_is_flannels_json(overlay: Lab) -> None:
    host = overlay.hosts[0]
    subnet = IPv4Network(host.subnet_env()["FLANNEL_SUBNET"], strict=False)
    key = f"{PREFIX}/subnets/{subnet[0]}-24"
    (value,) = overlay.etcdctl("get", "--print-value-only", key).splitlines()
    mac = json.loads(value)["BackendData"]["VtepMAC"]
    assert value == (
        f'{{"PublicIP":"{host.address}","PublicIPv6":null,"BackendType":"vxlan",'
        f'"BackendData":{{"VNI":1,"VtepMAC":"{mac}"}}}}'
    )
    number = json.loads(overlay.etcdctl("get", "-w", "json", key))["kvs"][0]["lease"]
    assert "granted with TTL(86400s)" in overlay.etcdctl("lease", "timetolive", f"{number:x}")


def test_restart_keeps_subnet_mac_and_traffic(overlay: Lab) -> None:
    host, before = overlay.hosts[1], overlay.leases()
    assert host.stop(0, signal.SIGTERM) == 0
    assert "Exiting cleanly..." in host.log.read_text()
    overlay.start_daemon(host)
    assert overlay.leases() == before
    (_, ours), (ours_host, _), _ = _containers(overlay)
    wait_until(lambda: ping(ours, container_address(ours_host)), "a ping after the restart", 10)


def test_bad_neighbours_remove_nobody_and_a_deleted_one_goes(overlay: Lab) -> None:
    host = overlay.hosts[0]
    before = host.ip("route")
    for key, value in (
        ("foo", "bar"),
        ("10.244.77.0-24", "{bad"),
        ("10.244.78.0-24", "{}"),
        ("10.244.79.0-24", '{"PublicIP":"192.168.77.9","BackendType":"host-gw"}'),
        ("10.244.200.128-25", '{"PublicIP":"192.168.77.9","BackendType":"vxlan","BackendData":'
         '{"VNI":1,"VtepMAC":"0a:00:00:00:00:09"}}'),
    ):  # fmt: skip
        overlay.etcdctl("put", f"{PREFIX}/subnets/{key}", value)
    marker = "10.244.201.0/24 via 10.244.201.0 dev flannel.1 onlink"
    overlay.etcdctl(
        "put",
        f"{PREFIX}/subnets/10.244.201.0-24",
        '{"publicip":"192.168.77.8","backendType":"vxlan",'
        '"backenddata":{"vtepmac":"0A-00-00-00-00-08"}}',
    )
    wait_until(lambda: marker in host.ip("route"), "the good lease behind the bad ones")
    overlay.etcdctl("del", f"{PREFIX}/subnets/10.244.201.0-24")
    wait_until(lambda: marker not in host.ip("route"), "the deleted lease is gone")
    assert host.ip("route") == before
    for key in ("foo", "10.244.77.0-24", "10.244.78.0-24", "10.244.79.0-24", "10.244.200.128-25"):
        overlay.etcdctl("del", f"{PREFIX}/subnets/{key}")


def test_own_lease_deleted_is_created_again(overlay: Lab) -> None:
    before = overlay.leases()
    subnet = IPv4Network(overlay.hosts[0].subnet_env()["FLANNEL_SUBNET"], strict=False)
    overlay.etcdctl("del", f"{PREFIX}/subnets/{subnet[0]}-24")
    wait_until(lambda: overlay.leases() == before, "the lease is back")
