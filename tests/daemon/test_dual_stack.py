"""Dual stack: IPv6 inside over IPv6 outside, beside IPv4 over IPv4, with a kernel node.

c1 -- h1 (ours) ---+
c2 -- h2 (ours) ---+-- switch, etcd      192.168.77.0/24 and fd77::/64
c3 -- h3 (kernel) -+
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path

import pytest
from scapy.layers.inet import UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether

from pyflannel.commands import doctor_host
from pyflannel.commands.echo import echo
from pyflannel.dataplane import sysctl
from pyflannel.dataplane.route import IPAddress
from tests.lab.hosts import (
    ETCD_PORT,
    NETWORK,
    PREFIX,
    SWITCH_ADDRESS,
    SWITCH_ADDRESS_V6,
    Host,
    Lab,
    Namespace,
    container_address,
    is_reached,
    lab,
    narrowed,
    ping,
    wait_until,
)
from tests.lab.inside import inside
from tests.lab.iperf import iperf3
from tests.lab.kernel_node import program_kernel_node, start_kernel_node
from tests.lab.require import require_program, require_root

NETWORK_V6 = IPv6Network("2001:db8:42::/56")
CONFIG = (
    f'{{{NETWORK},"EnableIPv6":true,"IPv6Network":"{NETWORK_V6}","Backend":{{"Type":"vxlan"}}}}'
)
ETCD = f"http://{SWITCH_ADDRESS}:{ETCD_PORT}"
KERNEL_SUBNET, KERNEL_MAC = IPv4Network("10.244.200.0/24"), "0a:00:00:00:00:03"
KERNEL_V6 = IPv6Network("2001:db8:42:c8::/64"), "0a:06:00:00:00:03"

# Prints the first frame with a UDP datagram over IPv6 that comes in on eth0, its checksum computed
# by the sender: the underlay has no offloads.
SNIFF = """
import socket
s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x86dd))
s.bind(("eth0", 0))
print("sniffing", flush=True)
while True:
    frame, where = s.recvfrom(65535)
    if where[2] == socket.PACKET_HOST and frame[20] == 17 and frame[56:58] == b"\\x21\\x18":
        print(frame.hex(), flush=True)
        break
"""


@pytest.fixture(scope="module")
def made() -> Iterator[Lab]:
    require_root()
    for program in (
        "ip",
        "bridge",
        "ethtool",
        "etcd",
        "etcdctl",
        "ping",
        "iperf3",
        "nft",
        "ip6tables-nft",
    ):
        require_program(program)
    with lab(3, dual_stack=True) as made:
        made.put_config(CONFIG)
        for host in made.hosts[:2]:
            made.start_daemon(host, "--healthz-port", "8081")
        start_kernel_node(made, made.hosts[2], KERNEL_SUBNET, KERNEL_MAC, ipv6=KERNEL_V6)
        program_kernel_node(made, made.hosts[2])
        for host in made.hosts:
            made.add_container(host)
        for host in made.hosts[:2]:
            for other in made.hosts:
                if other is not host:
                    line = _route_v6(_subnet_v6(other))
                    wait_until(partial(_has_route, host, line), f"a route to {other.name}")
        yield made


def _route_v6(subnet: IPv6Network) -> str:
    """Return the line that `ip -6 route` shows for a peer of flannel's."""
    return f"{subnet} via {subnet[0]} dev flannel-v6.1 metric 1024 onlink"


def _subnet_v6(host: Host) -> IPv6Network:
    return IPv6Network(host.subnet_env()["FLANNEL_IPV6_SUBNET"], strict=False)


def _has_route(host: Host, line: str) -> bool:
    return line in host.ip("-6", "route")


def _containers(made: Lab) -> list[tuple[Host, Namespace]]:
    return [(host, host.container) for host in made.hosts if host.container is not None]


@pytest.mark.parametrize("version", [4, 6])
def test_every_container_reaches_every_other(made: Lab, version: int) -> None:
    for _, source in _containers(made):
        for host, other in _containers(made):
            if other is not source:
                target = container_address(host, version)
                wait_until(partial(ping, source, target, "-W", "0.2"), f"a ping to {target}", 10)


def test_every_host_reaches_the_containers_from_its_device(made: Lab) -> None:
    for host in made.hosts:
        for other in made.hosts:
            if other is not host:
                assert is_reached(host, container_address(other, 6)), (host.name, other.name)


def test_full_size_packet_passes_and_one_byte_more_does_not(made: Lab) -> None:
    for host, container in _containers(made)[:2]:
        target = container_address(made.hosts[2], 6)
        full = partial(ping, container, target, "-M", "do", "-s", "1382")
        wait_until(full, f"a full-size ping from {host.name}", 5)
        assert not ping(container, target, "-M", "do", "-s", "1383", "-W", "0.2")


@pytest.mark.alone
@pytest.mark.parametrize("flags", [(), ("-u", "-b", "20M")], ids=["tcp", "udp"])
def test_tcp_and_udp_both_ways_with_the_kernel_node(made: Lab, flags: tuple[str, ...]) -> None:
    (_, ours), _, (kernel_host, kernel) = _containers(made)
    target = container_address(kernel_host, 6)
    end = iperf3(ours, kernel, target, made.folder, "--bidir", *flags)
    for way in ("", "_bidir_reverse"):
        if "-u" in flags:
            assert end[f"sum_received{way}"]["packets"] > 1000
            assert end[f"sum_received{way}"]["lost_packets"] <= end["unread"]
        else:
            assert end[f"sum_received{way}"]["bytes"] > 1_000_000
    statistics = json.loads(kernel_host.ip("-s", "-j", "link", "show", "flannel-v6.1"))[0]
    assert statistics["stats64"]["rx"]["errors"] == 0


def _captured(made: Lab, host: Host, source: Namespace, target: Host) -> IPv6:
    """Return the outer packet of a ping with ECT(0), as it arrives on a host."""
    log = made.folder / f"{host.name}.sniff"
    log.unlink(missing_ok=True)
    index = host.start("python3", "-c", SNIFF, log=log)
    wait_until(lambda: "sniffing" in log.read_text(), "the sniffer is there")
    assert is_reached(source, container_address(target, 6), "-Q", "2")
    assert host.processes[index].wait(10) == 0
    return Ether(bytes.fromhex(log.read_text().split()[-1]))[IPv6]


def test_outer_packet_is_the_kernels_and_always_has_a_checksum(made: Lab) -> None:
    (h1, ours), _, (h3, kernels) = _containers(made)
    sent = _captured(made, h3, ours, h3)
    kernel = _captured(made, h1, kernels, h1)
    for packet, source, target in ((sent, h1, h3), (kernel, h3, h1)):
        assert (packet.src, packet.dst) == (str(source.address_v6), str(target.address_v6))
        assert packet[UDP].chksum != 0
        rebuilt = packet.copy()
        del rebuilt[UDP].chksum
        assert IPv6(bytes(rebuilt))[UDP].chksum == packet[UDP].chksum
    for name in ("tc", "fl", "plen", "nh", "hlim"):
        assert getattr(sent, name) == getattr(kernel, name), name
    assert (sent.tc, sent.fl, sent.hlim) == (2, 0, 64)
    assert bytes(sent[UDP].payload)[:8] == bytes(kernel[UDP].payload)[:8]


def test_congestion_on_the_way_reaches_the_container(made: Lab) -> None:
    (h1, ours), _, (_, kernels) = _containers(made)
    h1.exec(
        "nft",
        "table ip6 congested { chain way { type filter hook prerouting priority -300; "
        "udp dport 8472 ip6 ecn set ce; }; "
        "chain seen { type filter hook forward priority 0; "
        f"ip6 daddr {container_address(h1, 6)} ip6 ecn ce counter; }}; }}",
    )
    try:
        assert is_reached(kernels, container_address(h1, 6), "-Q", "2")
        seen = h1.exec("nft", "list", "chain", "ip6", "congested", "seen")
        assert re.search(r"counter packets [1-9]", seen)
        # Not-ECT with CE outside is what the kernel's device drops as well.
        assert not ping(ours, container_address(made.hosts[2], 6), "-W", "0.2")
    finally:
        h1.exec("nft", "delete", "table", "ip6", "congested")


def test_trace(made: Lab) -> None:
    host, kernel = made.hosts[0], made.hosts[2]
    found = host.ask("trace", address=str(container_address(kernel, 6)))
    assert found["sent"] is True
    assert found["route"]["subnet"] == str(KERNEL_V6[0])
    assert found["why"] == f"sent to VTEP {KERNEL_V6[1]} at {kernel.address_v6} port 8472 by eth0"
    bad = f"{PREFIX}/subnets/10.244.250.0-24&2001:db8:42:fa::-64"
    made.etcdctl("put", bad, '{"PublicIP":"192.168.77.8","PublicIPv6":"::1","BackendType":"vxlan"}')
    host.ip("route", "add", "2001:db8:42:fa::/64", "dev", "flannel-v6.1")
    wait_until(
        lambda: "is not used" in host.ask("trace", address="2001:db8:42:fa::1")["why"],
        "the bad lease is known",
    )
    for address, why in (
        (container_address(host, 6), "in this host's own subnet 2001:db8:42:"),
        (host.address_v6, "it is an address of this host"),
        (kernel.address_v6, f"outside the network {NETWORK_V6}"),
        ("2001:db8:42:fb::1", "no lease holds it"),
        ("2001:db8:42:fa::1", "is not used"),
    ):
        found = host.ask("trace", address=str(address))
        assert found["sent"] is False
        assert why in found["why"]
    host.ip("route", "del", "2001:db8:42:fa::/64", "dev", "flannel-v6.1")
    made.etcdctl("del", bad)


def _doctor(host: Host, *flags: str) -> dict[str, list[tuple[str, str]]]:
    """Return sentence and remedy of what each check has found; nothing of what only this machine
    may lack.
    """
    words = ("doctor", "--json", "--iface", "eth0", "--etcd-endpoints", ETCD, "--control-dir")
    state = ("--state-dir", str(host.folder / "state"))
    said = host.exec(
        *(sys.executable, "-m", "pyflannel", *words, str(host.folder), *state, *flags), check=False
    )
    report = json.loads(said)
    found: dict[str, list[tuple[str, str]]] = {
        check: [] for check in report["checks"] if check != "bridge"
    }
    for finding in report["findings"]:
        if finding["check"] in found:
            found[finding["check"]].append((finding["sentence"], finding["remedy"]))
    return found


def test_doctor_finds_nothing_amiss_where_both_families_are_well(made: Lab) -> None:
    found = _doctor(made.hosts[0])
    assert {"ipv6", "path-mtu", "vteps"} <= found.keys()
    assert not any(found.values()), found


def test_doctor_measures_a_smaller_mtu_on_the_way_over_both_families(made: Lab) -> None:
    host, kernel = made.hosts[0], made.hosts[2]
    with narrowed(made, kernel, 1403):
        found = _doctor(host)["path-mtu"]
    assert found == [
        (
            f"the way to {address} carries packets of 1403 bytes at most, not 1500",
            "raise the MTU on the way, or set Backend.MTU to 1403 in etcd",
        )
        for address in (kernel.address, kernel.address_v6)
    ]


def test_doctor_finds_what_is_amiss_with_ipv6(made: Lab) -> None:
    host, kernel = made.hosts[0], made.hosts[2]
    twin = f"{PREFIX}/subnets/10.244.250.0-24&2001:db8:42:fa::-64"
    value = next(x for x in made.leases().values() if x["PublicIP"] == str(kernel.address))
    ipv4 = {
        "PublicIP": str(SWITCH_ADDRESS),
        "BackendData": {"VNI": 1, "VtepMAC": "0a:00:00:00:00:52"},
    }
    made.etcdctl("put", twin, json.dumps(value | ipv4))
    wait_until(partial(_has_route, host, "2001:db8:42:fa::/64"), "the IPv6 route to the twin")
    wait_until(lambda: "10.244.250.0/24" in host.ip("route"), "the IPv4 route to the twin")
    closed = ("INPUT", "-p", "udp", "--dport", "8472", "-j", "DROP")
    settings = (
        ("net.ipv6.conf.all.forwarding", 0, 1),
        ("net.ipv6.conf.default.disable_ipv6", 1, 0),
        ("net.ipv6.conf.flannel-v6/1.ignore_routes_with_linkdown", 1, 0),
    )
    state = host.folder / "other-state"
    shutil.copytree(host.folder / "state", state)
    entry = json.loads((state / "flannel-v6.1.json").read_text()) | {"vtep_mac": KERNEL_MAC}
    (state / "flannel-v6.1.json").write_text(json.dumps(entry))
    kernel.exec("ip6tables-nft", "-I", *closed)
    host.exec("ip6tables-nft", "-I", *closed, "-s", "2001:db8:ffff::/48")
    for key, wrong, _ in settings:
        host.exec("sysctl", "-qw", f"{key}={wrong}")
    try:
        found = _doctor(host, "--state-dir", str(state))
        for (key, _, right), check in zip(settings, ("forwarding", "ipv6", "linkdown")):
            ((_, remedy),) = found[check]
            host.exec(*remedy.partition(";")[0].split())
            assert host.exec("sysctl", "-n", key).strip() == str(right)
    finally:
        for key, _, right in settings:
            host.exec("sysctl", "-qw", f"{key}={right}")
        for each in (host, kernel):
            each.exec("ip6tables-nft", "-F", "INPUT")
        made.etcdctl("del", twin)
    (own,) = [x for x in made.leases().items() if x[1]["PublicIP"] == str(host.address)]
    own_v6 = own[0].split("&")[1].replace("-", "/")
    own_mac = own[1]["BackendV6Data"]["VtepMAC"]  # type: ignore[index] # JSON
    assert {check: [x for x, _ in those] for check, those in found.items() if those} == {
        "firewall": [
            "ip6tables-nft closes UDP port 8472: -A INPUT -s 2001:db8:ffff::/48 -p udp -m udp "
            "--dport 8472 -j DROP"
        ],
        "forwarding": [
            "net.ipv6.conf.all.forwarding is 0: this host does not forward packets to or from its "
            "containers"
        ],
        "ipv6": ["net.ipv6.conf.default.disable_ipv6 is 1, so our device can have no IPv6 address"],
        "linkdown": [
            "net.ipv6.conf.flannel-v6/1.ignore_routes_with_linkdown is 1: while the daemon is "
            "away, packets to other nodes' containers leave unencapsulated by the default route"
        ],
        "leases": [
            f"the leases {KERNEL_V6[0]}, 2001:db8:42:fa::/64 have one public IP, "
            f"{kernel.address_v6}"
        ],
        "public-ip": [
            f"the lease {own_v6} has our public IP {host.address_v6} and the VTEP MAC {own_mac}, "
            f"where this host has {KERNEL_MAC}: another host uses our address"
        ],
        "vteps": [
            f"{ip_network(subnet)[0]}, the VTEP of {subnet} at {address}, does not answer over the "
            "overlay, though the host itself does"
            for subnet, address in (
                (KERNEL_V6[0], kernel.address_v6),
                ("10.244.250.0/24", SWITCH_ADDRESS),
                ("2001:db8:42:fa::/64", kernel.address_v6),
            )
        ],
    }


def test_doctor_names_a_kernel_without_ipv6(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sysctl, "ROOT", tmp_path)
    assert [x.sentence for x in doctor_host.check_ipv6()] == [
        "this kernel has no IPv6, and the network is dual stack"
    ]


def test_echo_in_ipv6_is_of_the_size_that_was_asked_for(made: Lab) -> None:
    host, kernel = made.hosts[0], made.hosts[2]
    both: set[IPAddress] = {kernel.address, kernel.address_v6}

    def who_answers(size: int, seconds: float) -> set[IPAddress]:
        return inside(host, lambda: asyncio.run(echo(dict.fromkeys(both, size), seconds)))

    assert who_answers(0, 10.0) == both
    assert who_answers(1500, 10.0) == both
    assert not who_answers(1501, 0.1)
    # A smaller MTU behind our own interface: the sender is told, and nothing is fragmented.
    kernel.ip("link", "set", "eth0", "mtu", "1400")
    made.switch.ip("link", "set", "h3", "mtu", "1400")
    try:
        assert who_answers(1400, 10.0) == both
        assert not who_answers(1401, 0.1)
    finally:
        kernel.ip("link", "set", "eth0", "mtu", "1500")
        made.switch.ip("link", "set", "h3", "mtu", "1500")


def test_restart_keeps_subnets_macs_and_traffic_and_does_the_rest_for_ipv6(made: Lab) -> None:
    host, before = made.hosts[1], made.leases()
    assert host.stop(0) == 0
    made.start_daemon(host, "--flannel-mtu", "1450", "--ip-masq", "--ip-blackhole-route")
    assert made.leases() == before
    env = host.subnet_env()
    assert (env["FLANNEL_MTU"], env["FLANNEL_IPMASQ"]) == ("1450", "true")
    assert "--flannel-mtu 1450 is above the MTU 1430 of flannel-v6.1" in host.log.read_text()
    subnet = ip_network(env["FLANNEL_IPV6_SUBNET"], strict=False)
    rules = host.exec("ip6tables", "-t", "nat", "-S", "FLANNEL-POSTRTG")
    assert f"-s {subnet} -d {NETWORK_V6} " in rules
    assert f"blackhole {subnet} dev lo" in host.ip("-6", "route")
    (_, ours), _, _ = _containers(made)
    wait_until(lambda: ping(ours, container_address(host, 6)), "a ping after the restart", 10)


def test_a_deleted_lease_takes_both_routes_along(made: Lab) -> None:
    host = made.hosts[0]
    key = "10.244.201.0-24&2001:db8:42:c9::-64"
    value = {
        "PublicIP": "192.168.77.8",
        "PublicIPv6": "fd77::8",
        "BackendType": "vxlan",
        "BackendData": {"VtepMAC": "0a:00:00:00:00:08"},
        "BackendV6Data": {"VtepMAC": "0a:06:00:00:00:08"},
    }
    made.etcdctl("put", f"{PREFIX}/subnets/{key}", json.dumps(value))
    line = _route_v6(IPv6Network("2001:db8:42:c9::/64"))
    wait_until(partial(_has_route, host, line), "the IPv6 route is there")
    made.etcdctl("del", f"{PREFIX}/subnets/{key}")
    wait_until(lambda: not _has_route(host, line), "the IPv6 route is gone")
    wait_until(lambda: "10.244.201.0/24" not in host.ip("route"), "the IPv4 route is gone")


def test_a_leftover_kernel_device_of_ipv6_is_named(made: Lab) -> None:
    host = made.add_host()
    # fmt: off
    host.ip("link", "add", "flannel-v6.1", "address", "0a:06:00:00:00:04", "type", "vxlan", "id",
            "1", "dev", "eth0", "local", str(host.address_v6), "dstport", "8472", "nolearning")
    # fmt: on
    index = made.start_daemon(host, wait=False)
    assert host.processes[index].wait(20) == 1
    assert "flannel-v6.1 is a kernel vxlan device" in host.log.read_text()
    assert "flannel.1:" not in host.ip("link")
    host.log.unlink()
    made.start_daemon(host, "--replace-kernel-device", "--public-ipv6", "fd77::99")
    value = next(x for x in made.leases().values() if x["PublicIP"] == str(host.address))
    assert value["PublicIPv6"] == "fd77::99"
    assert value["BackendV6Data"] == {"VNI": 1, "VtepMAC": "0a:06:00:00:00:04"}


def test_what_ipv6_needs_and_the_host_has_not_is_refused(made: Lab) -> None:
    host = made.add_host()
    for command, sentence in (
        (("link", "set", "eth0", "mtu", "1340"), "leaves 1270 bytes for packets, and IPv6 needs"),
        (("-6", "addr", "flush", "dev", "eth0"), "interface eth0 has no usable IPv6 address"),
    ):
        host.ip(*command)
        index = made.start_daemon(host, wait=False)
        assert host.processes[index].wait(20) == 1
        assert sentence in host.log.read_text().splitlines()[-1]
        assert "flannel" not in host.ip("link")


def test_a_host_gets_ipv6_beside_the_ipv4_subnet_it_has(made: Lab) -> None:
    """The network becomes dual stack; by the way with DirectRouting, and rules of nftables."""
    h1, h2 = made.hosts[:2]
    h1.stop(0)
    made.put_config('{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}')
    index = made.start_daemon(h1)
    subnet = h1.subnet_env()["FLANNEL_SUBNET"]
    assert "FLANNEL_IPV6_SUBNET" not in h1.subnet_env()
    h1.stop(index)
    direct = CONFIG.replace('"vxlan"', '"vxlan","DirectRouting":true')
    made.put_config(direct.replace("{", '{"EnableNFTables":true,', 1))
    made.start_daemon(h1)
    assert h1.subnet_env()["FLANNEL_SUBNET"] == subnet
    assert len([x for x in made.leases().values() if x["PublicIP"] == str(h1.address)]) == 1
    theirs = IPv6Network(h2.subnet_env()["FLANNEL_IPV6_SUBNET"], strict=False)
    assert f"{theirs} via {h2.address_v6} dev eth0 metric 1024" in h1.ip("-6", "route")
    for family, network in (("ip", "10.244.0.0/16"), ("ip6", str(NETWORK_V6))):
        table = f"flannel-ipv{4 if family == 'ip' else 6}"
        rules = h1.exec("nft", "list", "chain", family, table, "forward")
        assert f"{family} saddr {network} accept" in rules
    found = h1.ask("trace", address=str(theirs[2]))
    assert found["sent"] is True
    assert found["why"] == (
        f"sent straight to {h2.address_v6} by eth0, on the same link (DirectRouting)"
    )
    detour = (f"{h2.address_v6}/128", "via", str(SWITCH_ADDRESS_V6), "dev", "eth0")
    h1.ip("route", "add", *detour)
    wait_until(partial(_has_route, h1, _route_v6(theirs)), "the peer is behind a gateway now", 5)
    assert is_reached(h1, container_address(h2, 6))
    h1.ip("route", "del", *detour)
    straight = f"{theirs} via {h2.address_v6} dev eth0 metric 1024"
    wait_until(partial(_has_route, h1, straight), "the peer is on our link again", 5)


def test_a_network_without_ipv6_again_leaves_nothing_of_it_on_the_host() -> None:
    require_root()
    with lab(1, dual_stack=True) as made:
        (host,) = made.hosts
        made.put_config(CONFIG)
        index = made.start_daemon(host, "--ip-masq")
        rules = host.exec("ip6tables-save")
        assert "FLANNEL-POSTRTG" in rules and "flannel-v6.1" in host.ip("link")
        host.stop(index)
        made.put_config()
        made.start_daemon(host, "--ip-masq")
        assert "flannel-v6.1" not in host.ip("link") and "flannel.1" in host.ip("link")
        assert "deleted flannel-v6.1: the network config has no IPv6 now" in host.log.read_text()
        assert "FLANNEL" not in host.exec("ip6tables-save")


HOLDER = """\
import fcntl, struct, time
tun = open("/dev/net/tun", "r+b", buffering=0)
fcntl.ioctl(tun, 0x400454CA, struct.pack("16sH22x", b"flannel-v6.1", 0x1001))
time.sleep(60)
"""


def test_a_device_that_another_program_holds_is_left_alone() -> None:
    require_root()
    with lab(1) as made:
        (host,) = made.hosts
        host.start(sys.executable, "-c", HOLDER, log=made.folder / "holder.log")
        wait_until(lambda: "flannel-v6.1" in host.ip("link"), "the device is held")
        made.put_config()
        made.start_daemon(host)
        assert "flannel-v6.1" in host.ip("link")
        assert "deleted flannel-v6.1" not in host.log.read_text()


def test_a_takeover_that_fails_leaves_the_device_of_the_family_that_goes() -> None:
    require_root()
    with lab(1, dual_stack=True) as made:
        (host,) = made.hosts
        made.put_config(CONFIG)
        old = made.start_daemon(host)
        links = host.ip("-o", "link")  # with their indexes
        made.put_config()
        new = made.start_daemon(host, "--takeover", wait=False)
        assert host.processes[new].wait(20) == 1
        assert "restart instead" in host.log.read_text()
        assert host.processes[old].poll() is None
        assert host.ip("-o", "link") == links
