"""What a node leaves for others to look at equals what flanneld left, line by line.

The files in data/ are what flanneld and the kernel's device showed on a host with the addresses of
this lab's first host: `ip`'s output and subnet.env, and the keys in etcd.

c1 -- h1 (ours, 192.168.77.11) -- switch, etcd          h2: eth9 192.168.64.3 (ours)
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from tests.lab.hosts import PREFIX, Host, Lab, lab, wait_until
from tests.lab.require import require_program, require_root

DATA = Path(__file__).parent / "data"
CONFIG = '{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}'


def golden_sections() -> dict[str, str]:
    """Return the output of each command that flanneld's host was asked with."""
    parts = (DATA / "flannel-vxlan-host.txt").read_text().split("### ")[1:]
    return {name: text for name, _, text in (part.partition("\n") for part in parts)}


def golden_keys() -> dict[str, str]:
    lines = (DATA / "flannel-vxlan-etcd.txt").read_text().splitlines()
    return {key: value for key, value in pairwise(lines) if key.startswith("/")}


GOLDEN = golden_sections()
KEYS = golden_keys()
OWN, PEER = (f"{PREFIX}/subnets/10.244.{n}.0-24" for n in (35, 58))


def prepare(host: Host, subnet: str, mac: str) -> None:
    """Let the host remember a subnet and a VTEP MAC, so that its node becomes flanneld's twin."""
    host.subnet_file.write_text(f"FLANNEL_SUBNET={subnet}\n")
    state = host.folder / "state"
    state.mkdir()
    machine_id = Path("/etc/machine-id")
    entry = {
        "machine_id": machine_id.read_text().strip() if machine_id.exists() else "",
        "vtep_mac": mac,
    }
    (state / "flannel.1.json").write_text(json.dumps(entry))


@pytest.fixture(scope="module")
def made() -> Iterator[Lab]:
    require_root()
    for program in ("ip", "ethtool", "etcd", "etcdctl", "iptables"):
        require_program(program)
    with lab(2) as made:
        host = made.hosts[0]
        made.put_config(KEYS[f"{PREFIX}/config"])
        made.etcdctl("put", PEER, KEYS[PEER])
        prepare(host, "10.244.35.1/24", json.loads(KEYS[OWN])["BackendData"]["VtepMAC"])
        made.start_daemon(host, "-ip-masq")
        made.add_container(host)
        wait_until(lambda: "linkdown" not in host.ip("route"), "the bridge is up")
        yield made


def ip(made: Lab, *words: str) -> list[str]:
    return made.hosts[0].ip(*words).splitlines()


def about_the_device(lines: list[str]) -> list[str]:
    return [line for line in lines if "flannel.1" in line]


def test_subnet_env(made: Lab) -> None:
    host = made.hosts[0]
    assert host.subnet_file.read_text() == GOLDEN["subnet.env"]
    assert host.subnet_file.stat().st_mode & 0o777 == 0o644


def test_routes(made: Lab) -> None:
    assert ip(made, "route") == GOLDEN["ip route"].splitlines()


def test_routes_of_every_table(made: Lab) -> None:
    of_ipv4 = [
        line
        for line in GOLDEN["ip route show table all"].splitlines()
        if not line.startswith(("fe80:", "local fe80:", "local ::1", "multicast ff00:"))
    ]
    assert len(of_ipv4) == 12
    assert ip(made, "-4", "route", "show", "table", "all") == of_ipv4


def test_address(made: Lab) -> None:
    inet = "    inet 10.244.35.0/32 scope global flannel.1"
    forever = "       valid_lft forever preferred_lft forever"
    golden = GOLDEN["ip addr"].splitlines()
    ours = ip(made, "-4", "addr", "show", "flannel.1")
    assert golden[golden.index(inet) + 1] == forever
    assert ours[1:] == [inet, forever]


def test_link(made: Lab) -> None:
    """A TUN has no Ethernet, so flags, queue and link type differ by nature; the rest does not."""
    (golden,) = about_the_device(GOLDEN["ip -d link"].splitlines())[:1]
    ours = ip(made, "link", "show", "flannel.1")[0]

    def words(line: str) -> list[str]:
        name = line.split()[1]
        found = line.split()[3:]
        return [name, *(f"{key} {value}" for key, value in zip(found[::2], found[1::2]))]

    differing = ("qdisc", "qlen")
    assert [x for x in words(ours) if not x.startswith(differing)] == [
        x for x in words(golden) if not x.startswith(differing)
    ]
    assert {"UP", "LOWER_UP"} <= set(ours.split("<")[1].split(">")[0].split(","))


def test_keys_in_etcd(made: Lab) -> None:
    printed = made.etcdctl("get", "--prefix", f"{PREFIX}/").splitlines()
    assert dict(zip(printed[::2], printed[1::2])) == KEYS
    (kv,) = json.loads(made.etcdctl("get", "-w", "json", OWN))["kvs"]
    told = made.etcdctl("lease", "timetolive", "--keys", f"{kv['lease']:x}")
    golden = (DATA / "flannel-vxlan-etcd.txt").read_text().splitlines()
    (line,) = [x for x in golden if x.startswith("lease ") and OWN in x]
    varying = re.compile(r"lease \w+|remaining\(\d+s\)")
    assert varying.sub("", told.rstrip()) == varying.sub("", line)


def test_fresh_start_as_it_was_seen(made: Lab) -> None:
    """The vector of spec section 19: other prefix, key names in lower case, an odd peer."""
    host = made.hosts[1]
    # fmt: off
    host.ip("link", "add", "eth9", "address", "0a:00:00:00:09:09", "type", "veth", "peer", "name",
            "cable9")
    # fmt: on
    for name in ("eth9", "cable9"):
        host.ip("link", "set", name, "up")
    host.ip("addr", "add", "192.168.64.3/24", "dev", "eth9")
    prepare(host, "10.5.6.1/24", "de:17:81:aa:eb:3c")
    host.exec("sysctl", "-qw", "net.ipv4.ip_forward=0")
    prefix = "/other/network"
    made.etcdctl(
        "put", f"{prefix}/config", '{ "network": "10.5.0.0/16", "backend": {"type": "vxlan"}}'
    )
    made.start_daemon(host, "-ip-masq", "-etcd-prefix", prefix, iface="eth9")
    key = f"{prefix}/subnets/10.5.6.0-24"
    assert made.etcdctl("get", "--print-value-only", key) == (
        '{"PublicIP":"192.168.64.3","PublicIPv6":null,"BackendType":"vxlan",'
        '"BackendData":{"VNI":1,"VtepMAC":"de:17:81:aa:eb:3c"}}\n'
    )
    assert host.subnet_file.read_text() == (
        "FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET=10.5.6.1/24\nFLANNEL_MTU=1450\n"
        "FLANNEL_IPMASQ=true\n"
    )
    assert "inet 10.5.6.0/32 scope global flannel.1" in host.ip("addr")
    assert "sysctl -w net.ipv4.ip_forward=1" in host.log.read_text()
    assert "ip_forward" not in made.hosts[0].log.read_text()
    made.etcdctl(
        "put",
        f"{prefix}/subnets/10.5.200.0-24",
        '{"publicip":"192.168.64.4","backendtype":"vxlan",'
        '"backenddata":{"vtepmac":"0A-00-00-00-00-04"}}',
    )
    wait_until(
        lambda: "10.5.200.0/24 via 10.5.200.0 dev flannel.1 onlink" in host.ip("route"),
        "the route to the peer",
    )
