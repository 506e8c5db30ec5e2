"""Changes while traffic flows, and odd neighbours, beside a kernel vxlan device set up oddly.

c1 -- h1 (ours) ----------------------------+
c2 -- h2 (kernel, sends no UDP checksum) ---+-- switch, etcd; VNI 4097, port 4789
"""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest

from pyflannel.dataplane.route import IPAddress
from tests.lab.hosts import (
    NETWORK,
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
from tests.lab.wire import UDP_HEADER, tap

VNI, PORT = 4097, 4789
DEVICE = f"flannel.{VNI}"
KERNEL_SUBNET = IPv4Network("10.244.200.0/24")
KERNEL_KEY = f"{PREFIX}/subnets/10.244.200.0-24"
KERNEL_MAC, OTHER_MAC = "0a:00:00:00:00:03", "0a:00:00:00:00:13"
PINGS_PER_SECOND = 100
KERNEL_ROUTE = f"{KERNEL_SUBNET} via {KERNEL_SUBNET[0]} dev {DEVICE} onlink"


@pytest.fixture(scope="module")
def made() -> Iterator[Lab]:
    require_root()
    for program in ("ip", "bridge", "ethtool", "etcd", "etcdctl", "ping", "iperf3", "ss"):
        require_program(program)
    with lab(2) as made:
        made.put_config(f'{{{NETWORK},"Backend":{{"Type":"vxlan","VNI":{VNI},"Port":{PORT}}}}}')
        ours = made.hosts[0]
        made.start_daemon(ours)
        start_kernel(made)
        for host in made.hosts:
            made.add_container(host)
        wait_until(lambda: KERNEL_ROUTE in ours.ip("route"), "the route to the kernel node")
        wait_until(lambda: answered(made), "a first ping")
        yield made


def start_kernel(made: Lab, mac: str = KERNEL_MAC) -> None:
    kernel = made.hosts[1]
    start_kernel_node(made, kernel, KERNEL_SUBNET, mac, vni=VNI, port=PORT, flags=("noudpcsum",))
    program_kernel_node(made, kernel, vni=VNI)


def ends(made: Lab) -> tuple[tuple[Namespace, IPAddress], tuple[Namespace, IPAddress]]:
    """Return each container with the address of the other one."""
    (ours, kernel) = made.hosts
    assert ours.container is not None
    assert kernel.container is not None
    return (
        (ours.container, container_address(kernel)),
        (kernel.container, container_address(ours)),
    )


def answered(made: Lab) -> bool:
    return all(ping(source, target) for source, target in ends(made))


def receive_errors(host: Host) -> int:
    (link,) = json.loads(host.ip("-s", "-j", "link", "show", DEVICE))
    return int(link["stats64"]["rx"]["errors"])


@contextmanager
def steady_pings(source: Namespace, target: IPAddress) -> Iterator[list[int]]:
    """Ping all the time; afterwards the list holds how many were sent and lost."""
    counts: list[int] = []
    interval = str(1 / PINGS_PER_SECOND)
    process = subprocess.Popen(
        ["ip", "netns", "exec", source.name, "ping", "-q", "-i", interval, str(target)],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield counts
    finally:
        process.send_signal(2)
        printed, _ = process.communicate(timeout=30)
    found = re.search(r"(\d+) packets transmitted, (\d+) received", printed)
    assert found is not None, printed
    sent, received = map(int, found.groups())
    counts += [sent, sent - received]


def test_the_kernel_sends_no_checksum_and_we_send_one(made: Lab) -> None:
    (source, target), _ = ends(made)
    ours, kernel = made.hosts
    seen = {}
    with tap(ours, "eth0") as wire:
        assert is_reached(source, target)
        for frame in wire.vxlan_frames(PORT, 2):
            sender = IPv4Address(frame[26:30])
            seen[sender] = frame[UDP_HEADER][6:8]
            assert frame[46:49] == VNI.to_bytes(3, "big")
    assert seen.keys() == {ours.address, kernel.address}
    assert seen[ours.address] != b"\0\0"
    assert seen[kernel.address] == b"\0\0"


def test_full_size_with_df_both_ways(made: Lab) -> None:
    for source, target in ends(made):
        assert is_reached(source, target, "-M", "do", "-s", "1422")
    assert receive_errors(made.hosts[1]) == 0


def test_oversize_without_df_is_fragmented_inside(made: Lab) -> None:
    for source, target in ends(made):
        for size in ("1423", "4000", "20000"):
            assert is_reached(source, target, "-M", "dont", "-s", size), size
    assert receive_errors(made.hosts[1]) == 0


def test_oversize_with_df_is_told_the_mtu_by_either_host(made: Lab) -> None:
    for (source, target), host in zip(ends(made), made.hosts):
        for namespace, names in ((host, ("cni0", "veth0")), (source, ("eth0",))):
            for name in names:
                namespace.ip("link", "set", name, "mtu", "1500")
        answer = source.exec(
            "ping", "-c", "1", "-W", "1", "-M", "do", "-s", "1423", str(target), check=False
        )
        assert re.search(r"(?i)frag needed and df set \(mtu = 1450\)", answer), answer
        source.ip("route", "flush", "cache")
        source.ip("link", "set", "eth0", "mtu", "1450")
        assert is_reached(source, target, "-M", "do", "-s", "1422")


@pytest.mark.alone
@pytest.mark.parametrize("flags", [(), ("-R",), ("-u", "-b", "20M"), ("-u", "-b", "20M", "-R")])
def test_tcp_and_udp_both_ways(made: Lab, flags: tuple[str, ...]) -> None:
    (source, target), (sink, _) = ends(made)
    end = iperf3(source, sink, target, made.folder, *flags)
    if "-u" in flags:
        assert end["sum"]["packets"] > 500
        assert end["sum"]["lost_packets"] <= end["unread"]
    else:
        assert end["sum_received"]["bytes"] > 1_000_000
    assert receive_errors(made.hosts[1]) == 0


@pytest.mark.alone
def test_the_kernel_nodes_mac_changes_while_packets_flow(made: Lab) -> None:
    (source, target), _ = ends(made)
    kernel = made.hosts[1]
    value = made.etcdctl("get", "--print-value-only", KERNEL_KEY).strip()
    for mac in (OTHER_MAC, KERNEL_MAC):
        with steady_pings(source, target) as counts:
            began = time.monotonic()
            made.etcdctl("put", KERNEL_KEY, value.replace(KERNEL_MAC, mac))
            kernel.ip("link", "set", DEVICE, "address", mac)
            # With its MAC a kernel device loses its neighbours, the permanent ones too.
            program_kernel_node(made, kernel, vni=VNI)
            wait_until(partial(is_sent_to, made, mac), "we send to the new MAC")
            changing = time.monotonic() - began
            for _ in range(20):
                assert is_reached(source, target)
        sent, lost = counts
        assert sent > 5
        # What was sent to a MAC that was not there, and while the neighbours were missing; and the
        # last one's answer may be under way.
        assert lost <= PINGS_PER_SECOND * changing + 1, counts


def is_sent_to(made: Lab, mac: str) -> bool:
    """Whether the next packet to the kernel node has its inner frame sent to this MAC."""
    ours, kernel = made.hosts
    with tap(kernel, "eth0") as wire:
        for _ in range(4):
            (frame,) = wire.vxlan_frames(PORT, 1)
            if IPv4Address(frame[26:30]) == ours.address:
                return frame[50:56].hex(":") == mac
    return False


def test_our_mac_changes(made: Lab) -> None:
    ours, kernel = made.hosts
    before = made.leases()
    state = ours.folder / "state" / f"{DEVICE}.json"
    entry = json.loads(state.read_text())
    assert ours.stop(len(ours.processes) - 1) == 0
    state.write_text(json.dumps({**entry, "vtep_mac": "0a:00:00:00:00:21"}))
    made.start_daemon(ours)
    after = made.leases()
    assert before.keys() == after.keys()
    (data,) = [x["BackendData"] for x in after.values() if x["PublicIP"] == str(ours.address)]
    assert data == {"VNI": VNI, "VtepMAC": "0a:00:00:00:00:21"}
    program_kernel_node(made, kernel, vni=VNI)
    wait_until(lambda: answered(made), "pings")


def test_the_kernel_node_is_made_anew(made: Lab) -> None:
    kernel = made.hosts[1]
    kernel.ip("link", "del", DEVICE)
    (source, target), _ = ends(made)
    assert not ping(source, target)
    start_kernel(made)
    wait_until(lambda: answered(made), "traffic with the new device", 10)


def test_a_deleted_lease_takes_its_routes_and_comes_back(made: Lab) -> None:
    ours = made.hosts[0]
    (source, target), _ = ends(made)
    value = made.etcdctl("get", "--print-value-only", KERNEL_KEY).strip()
    made.etcdctl("del", KERNEL_KEY)
    wait_until(lambda: KERNEL_ROUTE not in ours.ip("route"), "the route is gone")
    assert not ping(source, target)
    made.etcdctl("put", KERNEL_KEY, value)
    wait_until(lambda: KERNEL_ROUTE in ours.ip("route"), "the route is back")
    wait_until(lambda: answered(made), "pings")


def test_odd_neighbours_change_nothing(made: Lab) -> None:
    """The robustness vectors of spec section 19 that are not in test_overlay."""
    ours, kernel = made.hosts
    routes, leases = ours.ip("route"), made.leases()
    own = next(key for key, x in leases.items() if x["PublicIP"] == str(ours.address))
    lease = json.dumps({**leases[own], "PublicIP": "192.168.77.9"})
    without_mac = '{"PublicIP":"192.168.77.9","BackendType":"vxlan","BackendData":{"VtepMAC":""}}'
    duplicate = json.dumps({**leases["10.244.200.0-24"], "PublicIP": str(kernel.address)})
    for key, value in (
        ("10.244.90.0-24", without_mac),
        (f"{own}&fd00:9::-64", lease),
        ("10.244.200.0-24&fd00:9::-64", lease),
    ):
        made.etcdctl("put", f"{PREFIX}/subnets/{key}", value)
        made.etcdctl("del", f"{PREFIX}/subnets/{key}")
    # A second subnet of a known node: both are its own, so both are routed.
    made.etcdctl("put", f"{PREFIX}/subnets/10.244.91.0-24", duplicate)
    second = f"10.244.91.0/24 via 10.244.91.0 dev {DEVICE} onlink"
    wait_until(lambda: second in ours.ip("route"), "the duplicate's route")
    assert KERNEL_ROUTE in ours.ip("route")
    made.etcdctl("del", f"{PREFIX}/subnets/10.244.91.0-24")
    wait_until(lambda: ours.ip("route") == routes, "the routes are as before")
    made.etcdctl("put", f"{PREFIX}/subnets/{own}", json.dumps(leases[own], separators=(",", ":")))
    wait_until(lambda: answered(made), "pings")
    assert made.leases() == leases
    assert "Traceback" not in Path(ours.log).read_text()
    assert ours.processes[-1].poll() is None


def test_nobody_counted_an_error(made: Lab) -> None:
    assert receive_errors(made.hosts[1]) == 0
