"""A dual-stack node keeps what it has, in both families, whatever happens to it and its host.

The nodes are made the twins of two hosts on which flanneld and the kernel's devices ran; data/ has
what those showed.

c1 -- h1 (ours) --+
                  +-- switch, etcd      192.168.77.0/24 and fd77::/64
c2 -- h2 (ours) --+
"""

from __future__ import annotations

import json
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import ip_network
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.lab.flows import flows
from tests.lab.hosts import (
    DEADLINE_SECONDS,
    PREFIX,
    Host,
    Lab,
    container_address,
    is_reached,
    lab,
    ping,
    wait_until,
)
from tests.lab.require import require_program, require_root
from tests.lab.supervisor import Supervisor

pytestmark = pytest.mark.alone

DATA = Path(__file__).parent / "data"
RULES = Path(__file__).parents[1] / "dataplane" / "data" / "flannel-ip6tables-save.txt"
DEVICES = ("flannel.1", "flannel-v6.1")
FLAGS = ("-ip-masq", "--healthz-port", "8081")
LIMIT_SECONDS = 1.0
PACKETS_PER_SECOND = 2000


def _golden_keys() -> dict[str, str]:
    lines = (DATA / "flannel-vxlan-dual-etcd.txt").read_text().splitlines()
    return {key: value for key, value in pairwise(lines) if key.startswith("/")}


def _golden_sections() -> dict[str, str]:
    parts = (DATA / "flannel-vxlan-dual-host.txt").read_text().split("### ")[1:]
    return {name: text for name, _, text in (part.partition("\n") for part in parts)}


CONFIG, *KEYS = _golden_keys()
VALUES = _golden_keys()
GOLDEN = _golden_sections()


def _prepare(host: Host, key: str, value: dict[str, Any]) -> None:
    """Let the host remember subnets and VTEP MACs, so that its node becomes flanneld's twin."""
    parts = key.rsplit("/", 1)[1].replace("-", "/").split("&")
    names = ("FLANNEL_SUBNET", "FLANNEL_IPV6_SUBNET")
    lines = [f"{name}={part}\n" for name, part in zip(names, parts)]
    host.subnet_file.write_text("".join(lines))
    state = host.folder / "state"
    state.mkdir()
    machine_id = Path("/etc/machine-id")
    told = machine_id.read_text().strip() if machine_id.exists() else ""
    for device, data in zip(DEVICES, ("BackendData", "BackendV6Data")):
        entry = {"machine_id": told, "vtep_mac": value[data]["VtepMAC"]}
        (state / f"{device}.json").write_text(json.dumps(entry))


@pytest.fixture(scope="module")
def nodes() -> Iterator[Lab]:
    require_root()
    for program in ("ip", "ethtool", "etcd", "etcdctl", "ping", "iptables", "ip6tables"):
        require_program(program)
    with lab(2, dual_stack=True) as made:
        made.put_config(VALUES[CONFIG])
        for host, key in zip(made.hosts, KEYS):
            _prepare(host, key, json.loads(VALUES[key]))
            made.start_daemon(host, *FLAGS)
            made.add_container(host)
        wait_until(lambda: _reaches(made), "pings")
        yield made


def _reaches(nodes: Lab) -> bool:
    """Whether the containers reach each other in both families."""
    first, second = nodes.hosts
    assert first.container is not None
    source = first.container
    return all(ping(source, container_address(second, x), "-W", "0.2") for x in (4, 6))


def _device(host: Host, name: str) -> object:
    """A device as others see it: all but its index, counters and link-local address."""
    (link,) = json.loads(host.ip("-d", "-j", "addr", "show", name))
    addresses = [
        (x["local"], x["prefixlen"], x["scope"]) for x in link["addr_info"] if x["scope"] != "link"
    ]
    return link["mtu"], link["txqlen"], "UP" in link["flags"], link["linkinfo"], addresses


def _routes(host: Host) -> list[str]:
    """Our devices' routes of both families, without those of the kernel's own making."""
    lines = [*host.ip("route").splitlines(), *host.ip("-6", "route").splitlines()]
    return [x.strip() for x in lines if any(name in x for name in DEVICES) and "fe80:" not in x]


def _state(nodes: Lab, host: Host) -> object:
    """All that the peers, the kernel and the containers' runtimes know the node by."""
    devices = [_device(host, name) for name in DEVICES]
    return devices, _routes(host), nodes.leases(), host.subnet_file.read_text()


def _daemon(host: Host) -> int:
    return next(index for index, x in enumerate(host.processes) if x.poll() is None)


def test_etcd_holds_flannels_keys_and_values(nodes: Lab) -> None:
    for key in KEYS:
        assert nodes.etcdctl("get", "--print-value-only", key).strip() == VALUES[key]
    assert [f"{PREFIX}/subnets/{key}" for key in nodes.leases()] == sorted(KEYS)


def test_host_state_is_flannels_but_for_an_mtu_that_every_container_can_use(nodes: Lab) -> None:
    host = nodes.hosts[0]
    golden = GOLDEN["subnet.env"]
    assert host.subnet_file.read_text() == golden.replace("FLANNEL_MTU=1450", "FLANNEL_MTU=1430")
    for name in DEVICES:
        about = GOLDEN["ip addr"].split(f": {name}: ")[1].split("\n5: ")[0].split("\n4: ")[0]
        (address,) = [x for x in about.splitlines() if "scope global" in x]
        assert address in host.ip("addr", "show", name).splitlines()
        assert f" mtu {about.split(' mtu ')[1].split()[0]} " in host.ip("link", "show", name)
    expected = [
        line.strip()
        for line in GOLDEN["ip route show table all"].splitlines()
        if any(name in line for name in DEVICES)
        and "fe80:" not in line
        and "table local" not in line
        and not line.startswith("multicast")
    ]
    assert len(expected) == 3
    assert sorted(_routes(host)) == sorted(expected)


def _rules(host: Host) -> list[str]:
    saved = host.exec("ip6tables-save", "-t", "filter") + host.exec("ip6tables-save", "-t", "nat")
    return [line for line in saved.splitlines() if line.startswith("-A")]


def test_ipv6_rules_are_flannels_and_come_back(nodes: Lab) -> None:
    host = nodes.hosts[0]
    expected = [line for line in RULES.read_text().splitlines() if line.startswith("-A")]
    assert _rules(host) == expected
    _within_a_second(
        lambda: host.exec("ip6tables", "-t", "nat", "-F", "FLANNEL-POSTRTG"),
        lambda: _rules(host) == expected,
    )


def test_status_metrics_and_peers_show_both_families(nodes: Lab) -> None:
    host, peer = nodes.hosts
    wait_until(lambda: _reaches(nodes), "pings")
    status = host.ask("status")
    value = json.loads(VALUES[KEYS[0]])
    macs = [value[name]["VtepMAC"] for name in ("BackendData", "BackendV6Data")]
    lease = status["lease"]
    assert (lease["public_ip"], lease["public_ipv6"]) == (value["PublicIP"], value["PublicIPv6"])
    assert [lease["vtep_mac"], lease["vtep_mac_ipv6"]] == macs
    words = ("-m", "pyflannel", "leases", "--control-dir", str(host.folder))
    (line,) = [x for x in host.exec(sys.executable, *words).splitlines() if macs[1] in x]
    assert line.split() == [
        "10.244.100.0/24",
        "2001:db8:42:3a::/64",
        *list(value.values())[:2],
        *macs,
    ]
    assert [x["name"] for x in status["devices"]] == list(DEVICES)
    v4, v6 = status["peers"]
    assert (v4["address"], v6["address"]) == (str(peer.address), str(peer.address_v6))
    for shown in (v4, v6):
        assert shown["decap_packets"] > 0
        assert shown["last_seen_seconds"] < 60
    read = "import urllib.request as r; print(r.urlopen('http://127.0.0.1:8081/metrics').read())"
    page = host.exec(sys.executable, "-c", read)
    for shown in (v4, v6):
        assert f'subnet="{shown["subnet"]}"' in page


def _takeover(nodes: Lab, host: Host) -> None:
    old = host.processes[_daemon(host)]
    nodes.start_daemon(host, *FLAGS, "--takeover")
    assert old.wait(DEADLINE_SECONDS) == 0


def _offloads(host: Host) -> list[str]:
    return [x["offloads"] for x in host.ask("status")["devices"]]


def test_takeovers_lose_nothing_in_either_family(nodes: Lab) -> None:
    host = nodes.hosts[0]
    host.stop(_daemon(host))
    nodes.start_daemon(host, *FLAGS, "--offload", "off")
    _takeover(nodes, host)
    assert _offloads(host) == ["off", "off"]
    # The device that is made anew has what its process asks for, and the other what it had.
    before = _state(nodes, host)
    host.ip("link", "del", "flannel-v6.1")
    wait_until(lambda: "tso" in _offloads(host)[1] and _state(nodes, host) == before, "made anew")
    indexes, offloads = _indexes(host), _offloads(host)
    with flows(nodes, PACKETS_PER_SECOND, (4, 6)) as counts:
        for _ in range(2):
            _takeover(nodes, host)
    assert len(counts) == 4
    assert all(count.sent > PACKETS_PER_SECOND / 2 for count in counts)
    assert [(x.lost, x.duplicate, x.reordered) for x in counts] == [(0, 0, 0)] * 4, counts
    assert (_state(nodes, host), _indexes(host)) == (before, indexes)
    assert _offloads(host) == offloads
    assert offloads[0] == "off"


def _indexes(host: Host) -> list[int]:
    return [json.loads(host.ip("-j", "link", "show", name))[0]["ifindex"] for name in DEVICES]


def test_sighup_changes_nothing_where_nothing_has_changed(nodes: Lab) -> None:
    host = nodes.hosts[0]
    before, said = _state(nodes, host), host.log.read_text().count("Reloaded: ")
    host.processes[_daemon(host)].send_signal(signal.SIGHUP)
    wait_until(lambda: host.log.read_text().count("Reloaded: ") > said, "reloaded")
    last = host.log.read_text().rpartition("Reloaded: ")[2]
    assert "verbosity 0 as before" in last
    assert "the network configuration is as before" in last
    assert _state(nodes, host) == before
    wait_until(lambda: _reaches(nodes), "pings")


def test_restart_keeps_macs_subnets_and_routes(nodes: Lab) -> None:
    host = nodes.hosts[0]
    before, routes = _state(nodes, host), _routes(host)
    host.stop(_daemon(host))
    # Nobody serves the devices meanwhile, so nothing is sent; and nothing goes elsewhere.
    away = [line.replace(" linkdown", "").replace("  ", " ") for line in _routes(host)]
    assert [line.replace("  ", " ") for line in routes] == away
    # Without what it has kept, its lease still tells the MACs.
    shutil.rmtree(host.folder / "state")
    nodes.start_daemon(host, *FLAGS)
    assert _state(nodes, host) == before
    wait_until(lambda: _reaches(nodes), "pings")


@contextmanager
def _supervised(nodes: Lab, host: Host) -> Iterator[Callable[[], None]]:
    """Give a function that starts the daemon under a supervisor that keeps descriptors."""
    host.stop(_daemon(host))
    supervisor = Supervisor(host.folder)

    def start() -> None:
        ready = supervisor.collect().count("READY=1")
        nodes.start_daemon(host, *FLAGS, wrapper=supervisor.wrapper, wait=False)
        supervisor.give()
        wait_until(lambda: supervisor.collect().count("READY=1") > ready, "READY=1")

    try:
        start()
        yield start
    finally:
        host.stop(_daemon(host))
        supervisor.close()
    nodes.start_daemon(host, *FLAGS)


def test_packets_of_both_families_queue_while_a_supervisor_restarts_the_daemon(nodes: Lab) -> None:
    host = nodes.hosts[0]
    with _supervised(nodes, host) as start:
        before = _state(nodes, host)
        with flows(nodes, 500, (4, 6)) as counts:
            host.stop(_daemon(host))
            start()
        assert _state(nodes, host) == before
    assert [(x.lost, x.duplicate, x.reordered) for x in counts] == [(0, 0, 0)] * 4, counts


def _within_a_second(change: Callable[[], object], is_well: Callable[[], bool]) -> None:
    """Do something to the host; all must be well again in time."""
    change()
    wait_until(is_well, "well again", LIMIT_SECONDS)


DAMAGES = (
    ("link", "del", "flannel-v6.1"),
    ("link", "set", "flannel-v6.1", "down"),
    # Below 1280 the kernel takes IPv6 off the device.
    ("link", "set", "flannel-v6.1", "mtu", "1200"),
    ("-6", "addr", "flush", "dev", "flannel-v6.1"),
    ("-6", "route", "flush", "dev", "flannel-v6.1", "proto", "boot"),
    ("link", "del", "flannel.1"),
)


@pytest.mark.parametrize("words", DAMAGES, ids=" ".join)
def test_what_somebody_does_to_a_device_is_undone(nodes: Lab, words: tuple[str, ...]) -> None:
    host = nodes.hosts[0]
    before = _state(nodes, host)
    _within_a_second(
        lambda: host.ip(*words),
        lambda: all(x in host.ip("link") for x in DEVICES) and _state(nodes, host) == before,
    )
    wait_until(lambda: _reaches(nodes), "pings", LIMIT_SECONDS)


def test_router_advertisements_stay_ignored_on_a_device_that_lost_ipv6(nodes: Lab) -> None:
    accept = nodes.hosts[0].exec("sysctl", "-n", "net.ipv6.conf.flannel-v6/1.accept_ra")
    assert accept.strip() == "0"


def _told(nodes: Lab) -> tuple[object, object]:
    key = KEYS[0].rsplit("/", 1)[1]
    value = nodes.leases()[key]
    return value["PublicIP"], value["PublicIPv6"]


def test_new_ipv6_address_is_advertised_and_sent_from(nodes: Lab) -> None:
    host = nodes.hosts[0]
    before = _state(nodes, host)
    # Before the kernel lets an address be used it asks for a second or two whether it is unique.
    for old, new, flags, limit in (
        ("fd77::11", "fd77::111", ("nodad",), LIMIT_SECONDS),
        ("fd77::111", "fd77::11", (), 5 * LIMIT_SECONDS),
    ):
        host.ip("addr", "del", f"{old}/64", "dev", "eth0")
        wait_until(lambda: _reason(host) != "", "noticed")
        # The link-local address, which is all there is meanwhile, is no news for the peers.
        assert "eth0 has no usable IPv6 address" in _reason(host)
        assert _told(nodes) == (str(host.address), old)
        host.ip("addr", "add", f"{new}/64", "dev", "eth0", *flags)
        wait_until(
            lambda: _told(nodes) == (str(host.address), new) and _reaches(nodes),  # noqa: B023 called at once
            "well again",
            limit,
        )
    wait_until(lambda: _state(nodes, host) == before and not _reason(host), "as before")


def _reason(host: Host) -> str:
    return str(host.ask("status")["reasons"].get("host-network-ipv6", ""))


def test_mtu_of_the_interface_is_carried_on_to_both_devices(nodes: Lab) -> None:
    host = nodes.hosts[0]
    for outer in (1400, 1500):
        _within_a_second(
            lambda: host.ip("link", "set", "eth0", "mtu", str(outer)),  # noqa: B023 called at once
            lambda: (
                f"mtu {outer - 50} " in host.ip("link", "show", "flannel.1")  # noqa: B023 called at once
                and f"mtu {outer - 70} " in host.ip("link", "show", "flannel-v6.1")  # noqa: B023 called at once
                and host.subnet_env()["FLANNEL_MTU"] == str(outer - 70)  # noqa: B023 called at once
            ),
        )
    wait_until(lambda: _reaches(nodes), "pings", LIMIT_SECONDS)


def test_an_mtu_too_small_for_ipv6_leaves_ipv4_at_work(nodes: Lab) -> None:
    host, peer = nodes.hosts
    before = _state(nodes, host)
    assert host.container is not None
    host.ip("link", "set", "eth0", "mtu", "1340")
    try:
        wait_until(lambda: "leaves 1270 bytes for packets" in _reason(host), "told", LIMIT_SECONDS)
        assert is_reached(host.container, container_address(peer), "-M", "do", "-s", "1262")
    finally:
        host.ip("link", "set", "eth0", "mtu", "1500")
    wait_until(
        lambda: _state(nodes, host) == before and not _reason(host), "well again", LIMIT_SECONDS
    )
    wait_until(lambda: _reaches(nodes), "pings", LIMIT_SECONDS)


def test_smaller_mtu_on_the_way_to_a_peer_becomes_that_of_its_ipv6_route(nodes: Lab) -> None:
    host, peer = nodes.hosts
    before = _state(nodes, host)
    theirs = ip_network(peer.subnet_env()["FLANNEL_IPV6_SUBNET"], strict=False)
    way = (f"{peer.address_v6}/128", "dev", "eth0", "mtu", "1400")
    route = f"{theirs} via {theirs[0]} dev flannel-v6.1 metric 1024 onlink mtu 1330"
    _within_a_second(
        lambda: host.ip("-6", "route", "add", *way),
        lambda: any(line.startswith(route) for line in _routes(host)),
    )
    _within_a_second(
        lambda: host.ip("-6", "route", "del", *way), lambda: _state(nodes, host) == before
    )


def test_interface_down_and_up_costs_only_the_time_between(nodes: Lab) -> None:
    host = nodes.hosts[0]
    before = _state(nodes, host)
    host.ip("link", "set", "eth0", "down")
    wait_until(lambda: _reason(host) != "", "noticed")
    host.ip("link", "set", "eth0", "up")
    # With the interface the kernel has taken its IPv6 addresses down.
    _within_a_second(
        lambda: host.ip("addr", "add", f"{host.address_v6}/64", "dev", "eth0", "nodad"),
        lambda: _reaches(nodes),
    )
    wait_until(lambda: _state(nodes, host) == before and not _reason(host), "well again")
