"""Rules in the kernel: those of flanneld, back within a second, the other kind's gone.

c1 -- h1 (ours) --- switch, etcd: it has no route to c1, so it answers only what is masqueraded
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab import without_nfnetlink
from tests.lab.hosts import SWITCH_ADDRESS, Host, Lab, is_reached, lab, ping, wait_until
from tests.lab.require import require_program, require_root

DATA = Path(__file__).parent.parent / "dataplane" / "data"
NFT = "flannel-nft-list-ruleset.txt"
IPTABLES = "flannel-iptables-save.txt"
CONFIG = '{"Network":"10.244.0.0/16","EnableNFTables":%s,"Backend":{"Type":"vxlan"}}'
WRONG_RULE_4 = "ip saddr != SUBNET ip daddr 10.244.0.0/16 return"
RULE_4 = "ip saddr != 10.244.0.0/16 ip daddr SUBNET return"


@pytest.fixture(scope="module")
def made() -> Iterator[Lab]:
    require_root()
    for program in ("ip", "ethtool", "etcd", "etcdctl", "iptables", "iptables-legacy", "nft"):
        require_program(program)
    with lab(1) as made:
        yield made


@pytest.fixture(params=["nf_tables", "legacy", "nftables"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def host(made: Lab) -> Iterator[Host]:
    """A host without rules and without a daemon."""
    host = made.hosts[0]
    yield host
    for index in range(len(host.processes)):
        host.stop(index)
    host.processes.clear()
    for tool in ("iptables", "iptables-legacy"):
        host.exec(tool, "-w", "-P", "FORWARD", "ACCEPT")
        for table, hook in (("nat", "POSTROUTING"), ("filter", "FORWARD")):
            host.exec(tool, "-w", "-t", table, "-F", hook)
            for name in ("FLANNEL-POSTRTG", "FLANNEL-FWD"):
                host.exec(tool, "-w", "-t", table, "-F", name, check=False)
                host.exec(tool, "-w", "-t", table, "-X", name, check=False)
    host.exec("nft", "flush", "ruleset")
    host.ip("link", "del", "flannel.1", check=False)
    host.subnet_file.unlink(missing_ok=True)


def _start(made: Lab, host: Host, kind: str, *flags: str, wrapper: tuple[str, ...] = ()) -> int:
    """Start the daemon where `iptables` is of one kind; the periodic check is out of the way."""
    made.put_config(CONFIG % ("true" if kind == "nftables" else "false"))
    tools = made.folder / kind
    if not tools.exists():
        tools.mkdir()
        flavour = "legacy" if kind == "legacy" else "nft"
        for name in ("iptables", "ip6tables"):
            for suffix in ("", "-save", "-restore"):
                target = shutil.which(f"{name}-{flavour}{suffix}")
                assert target is not None
                (tools / f"{name}{suffix}").symlink_to(target)
    path = ("sh", "-c", f'PATH={tools}:$PATH; exec "$@"', "sh")
    return made.start_daemon(host, "--iptables-resync", "600", *flags, wrapper=(*wrapper, *path))


def _rules(host: Host, kind: str) -> str:
    """Return what the kernel has, in the form of the file of flanneld's rules."""
    if kind == "nftables":
        tables = (("ip", "flannel-ipv4"), ("ip6", "flannel-ipv6"))
        return "".join(host.exec("nft", "list", "table", *x, check=False) for x in tables)
    save = "iptables-legacy-save" if kind == "legacy" else "iptables-nft-save"
    lines = host.exec(save, "-t", "filter") + host.exec(save, "-t", "nat")
    return "".join(f"{x}\n" for x in lines.splitlines() if x[0] != "#")


def _expected(host: Host, kind: str) -> str:
    subnet = host.subnet_env()["FLANNEL_SUBNET"].replace(".1/24", ".0/24")
    if kind != "nftables":
        return _without_counters((DATA / IPTABLES).read_text().replace("10.244.35.0/24", subnet))
    text = (DATA / NFT).read_text().replace("10.244.27.0/24", "SUBNET")
    assert WRONG_RULE_4 in text
    return text.replace(WRONG_RULE_4, RULE_4).replace("SUBNET", subnet)


def _without_counters(text: str) -> str:
    return "".join(f"{x.split(' [')[0]}\n" for x in text.splitlines())


def _is_right(host: Host, kind: str) -> bool:
    rules = _rules(host, kind)
    found = rules if kind == "nftables" else _without_counters(rules)
    return found == _expected(host, kind)


def test_rules_are_flannels_and_stay_on_exit(made: Lab, host: Host, kind: str) -> None:
    index = _start(made, host, kind, "--ip-masq")
    assert _is_right(host, kind), _rules(host, kind)
    assert host.subnet_env()["FLANNEL_IPMASQ"] == "true"
    assert host.stop(index) == 0
    assert _is_right(host, kind)


def _damages(kind: str) -> list[tuple[str, ...]]:
    if kind == "nftables":
        return [
            ("nft", "flush", "ruleset"),
            ("nft", "flush", "chain", "ip", "flannel-ipv4", "postrtg"),
            ("nft", "delete", "table", "ip", "flannel-ipv4"),
            ("nft", "delete", "table", "ip6", "flannel-ipv6"),
            ("nft", "insert", "rule", "ip", "flannel-ipv4", "forward", "drop"),
        ]
    # The old kind's lock, which the daemon may hold a moment longer than it writes, is one of all.
    tool = ("iptables-legacy" if kind == "legacy" else "iptables-nft", "-w")
    return [
        (*tool, "-t", "nat", "-F"),
        (*tool, "-F"),
        (*tool, "-t", "nat", "-D", "FLANNEL-POSTRTG", "2"),
        (*tool, "-D", "FORWARD", "1"),
        (*tool, "-t", "nat", "-D", "POSTROUTING", "1"),
    ]


@pytest.mark.alone
def test_flushed_or_partly_deleted_rules_are_back_within_a_second(
    made: Lab, host: Host, kind: str
) -> None:
    index = _start(made, host, kind, "--ip-masq")
    before = host.log.read_text().count("they are back")
    for damage in _damages(kind):
        host.exec(*damage)
        wait_until(lambda: _is_right(host, kind), f"repaired after {' '.join(damage)}", 1.0)
    host.wait_for_log("they are back", times=before + len(_damages(kind)))
    host.stop(index)


def test_container_is_masqueraded(made: Lab, host: Host, kind: str) -> None:
    _start(made, host, kind)
    container = host.container or made.add_container(host)
    assert not ping(container, SWITCH_ADDRESS)
    host.stop(0)
    _start(made, host, kind, "--ip-masq")
    assert is_reached(container, SWITCH_ADDRESS)


@pytest.mark.parametrize("kind", ["nf_tables", "legacy"], indirect=True)
def test_forward_chain_accepts_behind_a_policy_of_drop(made: Lab, host: Host, kind: str) -> None:
    host.exec("iptables-legacy" if kind == "legacy" else "iptables-nft", "-P", "FORWARD", "DROP")
    index = _start(made, host, kind, "--ip-masq")
    container = host.container or made.add_container(host)
    assert is_reached(container, SWITCH_ADDRESS)
    host.stop(index)
    index = _start(made, host, kind, "--ip-masq", "--iptables-forward-rules=false")
    assert "FLANNEL-FWD" not in _rules(host, kind)
    assert not ping(container, SWITCH_ADDRESS)
    host.stop(index)
    _start(made, host, kind)
    assert "-A FLANNEL-FWD -s 10.244.0.0/16" in _rules(host, kind)
    assert "POSTRTG" not in _rules(host, kind)


def test_other_kinds_rules_are_removed(made: Lab, host: Host) -> None:
    host.stop(_start(made, host, "nf_tables", "--ip-masq"))
    host.exec("iptables", "-A", "FORWARD", "-s", "192.0.2.1", "-j", "DROP")
    host.stop(_start(made, host, "nftables", "--ip-masq"))
    saved = _rules(host, "nf_tables")
    assert "FLANNEL" not in saved
    assert "-A FORWARD -s 192.0.2.1/32 -j DROP" in saved
    assert "table ip flannel-ipv4" in _rules(host, "nftables")
    host.exec("iptables", "-F", "FORWARD")
    host.stop(_start(made, host, "nf_tables", "--ip-masq"))
    assert "table ip flannel-ipv4" not in _rules(host, "nftables")
    assert _is_right(host, "nf_tables")


def test_old_subnets_rules_go_and_a_second_networks_stay(made: Lab, host: Host) -> None:
    host.stop(_start(made, host, "nf_tables", "--ip-masq"))
    old = host.subnet_env()["FLANNEL_SUBNET"].replace(".1/24", ".0/24")
    other = '-s 10.9.0.0/16 -d 10.9.1.0/24 -m comment --comment "flanneld masq" -j RETURN'
    host.exec("sh", "-c", f"iptables -t nat -A FLANNEL-POSTRTG {other}")
    network = '{"Network":"10.245.0.0/16","Backend":{"Type":"vxlan"}}'
    made.etcdctl("del", "--prefix", "/coreos.com/network/subnets/")
    made.put_config(network)
    made.start_daemon(host, "--ip-masq")
    saved = _rules(host, "nf_tables")
    assert old not in saved
    assert "10.244.0.0/16" not in saved
    assert "-A FLANNEL-POSTRTG -s 10.245.0.0/16 ! -d 224.0.0.0/4" in saved
    assert f"-A FLANNEL-POSTRTG {other}" in saved
    made.etcdctl("del", "--prefix", "/coreos.com/network/subnets/")


def _without_tools(made: Lab) -> tuple[str, ...]:
    """Return a wrapper under which only the interpreter's folder is on the PATH."""
    empty = made.folder / "empty"
    empty.mkdir(exist_ok=True)
    return ("/bin/sh", "-c", f'PATH={empty}; exec "$@"', "sh")


@pytest.mark.parametrize(("kind", "program"), [("nf_tables", "iptables"), ("nftables", "nft")])
def test_missing_tool(made: Lab, host: Host, kind: str, program: str) -> None:
    made.put_config(CONFIG % ("true" if kind == "nftables" else "false"))
    wrapper = _without_tools(made)
    start = len(host.log.read_text()) if host.log.exists() else 0
    index = made.start_daemon(host, "--ip-masq", wait=False, wrapper=wrapper)
    assert host.processes[index].wait(20) == 1
    (error,) = [x for x in host.log.read_text()[start:].splitlines() if x.startswith("E")]
    assert f"--ip-masq: {program}" in error
    assert "is not installed" in error
    assert not host.subnet_file.exists()
    start = len(host.log.read_text())
    made.start_daemon(host, wrapper=wrapper)
    (warning,) = [x for x in host.log.read_text()[start:].splitlines() if "is not installed" in x]
    assert warning.startswith("W")
    assert "forward rules are missing" in warning


V6_PROGRAM = """
import asyncio
from ipaddress import ip_network
from pyflannel.dataplane.firewall import Iptables, Nftables
from pyflannel.dataplane.traffic_rules import traffic_rules

async def main():
    networks = ip_network("2001:db8:42::/56"), ip_network("2001:db8:42:3a::/64")
    rules = traffic_rules(*networks, masquerade=True, forward=True)
    for tool in (Iptables(fully_random=True), Nftables(fully_random=True)):
        print(await tool.ensure(rules, ()), await tool.ensure(rules, ()))

asyncio.run(main())
"""


def test_a_kernel_without_nfnetlink(made: Lab, host: Host, kind: str) -> None:
    host.log.write_text("")
    _start(made, host, kind, wrapper=(sys.executable, without_nfnetlink.__file__))
    assert host.ask("status")["reasons"] == {}
    if kind == "legacy":
        assert "FLANNEL-FWD" in _rules(host, kind)
    else:
        assert host.log.read_text().count("forward rules are missing: ") == 1
        assert "flannel" not in _rules(host, kind).lower()


def test_ipv6_rules_are_flannels(made: Lab, host: Host) -> None:
    assert host.exec(sys.executable, "-c", V6_PROGRAM) == "True False\n" * 2
    lines = host.exec("ip6tables-save", "-t", "filter") + host.exec("ip6tables-save", "-t", "nat")
    saved = "".join(f"{x}\n" for x in lines.splitlines() if x[0] != "#")
    expected = (DATA / "flannel-ip6tables-save.txt").read_text()
    assert _without_counters(saved) == _without_counters(expected)
    table = host.exec("nft", "list", "table", "ip6", "flannel-ipv6")
    assert "ip6 saddr != 2001:db8:42::/56 ip6 daddr 2001:db8:42:3a::/64 return" in table
    assert "ip6 saddr 2001:db8:42::/56 ip6 daddr != ff00::/8 masquerade fully-random" in table


@pytest.mark.alone
def test_a_program_that_removes_rules_again_and_again_is_not_fought(made: Lab, host: Host) -> None:
    index = _start(made, host, "nftables")
    flush = "while sleep 0.1; do nft flush chain ip flannel-ipv4 forward; done"
    rival = host.start("sh", "-c", flush, log=made.folder / "rival.log")
    wait_until(lambda: "again and again" in host.log.read_text(), "the daemon says so")
    host.stop(rival)
    assert host.processes[index].poll() is None


def test_missing_br_netfilter_is_a_warning(made: Lab, host: Host) -> None:
    made.put_config()
    hide = 'mount -t tmpfs none /proc/sys/net/bridge && exec "$@"'
    made.start_daemon(host, wrapper=("unshare", "-m", "sh", "-c", hide, "sh"))
    (line,) = [x for x in host.log.read_text().splitlines() if "modprobe br_netfilter" in x]
    assert line.startswith("W")
    assert "bypass iptables" in line


def test_blackhole_route_is_behind_a_bridges_and_comes_back(made: Lab, host: Host) -> None:
    made.put_config()
    made.start_daemon(host, "--ip-blackhole-route", "--iptables-resync", "1")
    gateway = host.subnet_env()["FLANNEL_SUBNET"]
    subnet = gateway.replace(".1/24", ".0/24")

    def has_blackhole() -> bool:
        return f"blackhole {subnet}" in host.ip("route")

    assert has_blackhole()
    host.ip("link", "add", "br7", "type", "bridge")
    host.ip("addr", "add", gateway, "dev", "br7")
    host.ip("link", "set", "br7", "up")
    assert "dev br7" in host.ip("route", "get", gateway.replace(".1/24", ".9"))
    host.ip("link", "del", "br7")
    host.ip("route", "del", "blackhole", subnet)
    wait_until(has_blackhole, "the blackhole route is back", 3)
