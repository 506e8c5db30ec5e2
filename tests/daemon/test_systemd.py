"""The unit of deploy/ under a real systemd, which is process 1 of the first host; dual stack.

c1 -- h1 (systemd, ours) -----+
                              +-- switch, etcd      192.168.77.0/24 and fd77::/64
c2 -- h2 (kernel vxlan) ------+
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import IPv4Network, IPv6Network

import pytest

from tests.lab.booted import SERVICE, UNIT, Booted, booted
from tests.lab.flows import flows
from tests.lab.hosts import (
    ETCD_PORT,
    NETWORK,
    SWITCH_ADDRESS,
    Lab,
    container_address,
    lab,
    ping,
    wait_until,
)
from tests.lab.kernel_node import program_kernel_node, start_kernel_node
from tests.lab.require import require_program, require_root

pytestmark = pytest.mark.alone

CONFIG = (
    f'{{{NETWORK},"EnableIPv6":true,"IPv6Network":"2001:db8:42::/56","Backend":{{"Type":"vxlan"}}}}'
)
KERNEL_SUBNET, KERNEL_MAC = IPv4Network("10.244.60.0/24"), "0a:00:00:00:00:60"
KERNEL_V6 = IPv6Network("2001:db8:42:c8::/64"), "0a:06:00:00:00:60"
DEVICES = ("flannel.1", "flannel-v6.1")
SETTINGS = f"""
FLANNELD_ETCD_ENDPOINTS=http://{SWITCH_ADDRESS}:{ETCD_PORT}
FLANNELD_IP_MASQ=true
PYFLANNEL_UDP_OPTIONS=--iface eth0
"""
PACKETS_PER_SECOND = 500
WATCHDOG_SECONDS = 6
CAP_NET_ADMIN, CAP_NET_RAW, CAP_SYS_NICE = 12, 13, 23
SCHED_RR = 2


@contextmanager
def _drop_in(node: Booted, *lines: str) -> Iterator[None]:
    """Add to the unit's [Service] what the next start finds."""
    path = node.path(f"/etc/systemd/system/{UNIT}.d/test.conf")
    path.parent.mkdir()
    path.write_text("\n".join(("[Service]", *lines, "")))
    node.systemctl("daemon-reload")
    try:
        yield
    finally:
        path.unlink()
        path.parent.rmdir()
        node.systemctl("daemon-reload")


@pytest.fixture(scope="module")
def nodes() -> Iterator[tuple[Lab, Booted]]:
    require_root()
    for program in ("etcd", "etcdctl", "ethtool", "ip", "iptables", "journalctl", "nft",
                    "nsenter", "ping", "setpriv", "systemctl", "unshare"):  # fmt: skip
        require_program(program)
    with lab(2, dual_stack=True) as made:
        made.put_config(CONFIG)
        first, second = made.hosts
        start_kernel_node(
            made, second, KERNEL_SUBNET, KERNEL_MAC, ipv6=KERNEL_V6, flags=("noudpcsum",)
        )
        with booted(first, SETTINGS) as node:
            node.systemctl("start", SERVICE)
            first.subnet_file.write_text(node.path("/run/flannel/subnet.env").read_text())
            program_kernel_node(made, second)
            for host in made.hosts:
                made.add_container(host)
            wait_until(lambda: _reaches(made), "pings")
            yield made, node


def _reaches(made: Lab) -> bool:
    """Whether the containers reach each other in both families."""
    first, second = made.hosts
    assert first.container is not None
    source = first.container
    return all(ping(source, container_address(second, version)) for version in (4, 6))


def _state(made: Lab, node: Booted) -> object:
    """What no restart may change."""
    host = made.hosts[0]
    devices = []
    for name in DEVICES:
        (link,) = json.loads(host.ip("-d", "-j", "addr", "show", name))
        devices.append((link["ifindex"], [entry["local"] for entry in link["addr_info"]]))
    subnet_env = node.path("/run/flannel/subnet.env").read_text()
    routes = (host.ip("route") + host.ip("-6", "route")).replace(" linkdown", "")
    return made.leases(), routes, devices, subnet_env


def _main(node: Booted) -> int:
    return int(node.show("MainPID"))


def _is_ready_again(node: Booted, restarts: int) -> bool:
    shown = node.systemctl("show", "-p", "NRestarts,SubState", SERVICE)
    return "SubState=running" in shown and f"NRestarts={restarts}\n" in shown


def _away_seconds(node: Booted) -> float:
    """How long nobody served at the last restart, by systemd's clock."""
    began = int(node.show("InactiveExitTimestampMonotonic"))
    left, ready = (int(node.show(f"Active{x}TimestampMonotonic")) for x in ("Exit", "Enter"))
    assert left <= began <= ready
    return (ready - left) / 1e6


def test_it_is_ready_when_the_start_returns(nodes: tuple[Lab, Booted]) -> None:
    _, node = nodes
    log = node.journal()
    assert log.index("Running backend.") < log.index(f"Started {SERVICE}.service")
    shown = node.systemctl("show", "-p", "ActiveState,NRestarts,Result,Type", SERVICE).split()
    assert sorted(shown) == ["ActiveState=active", "NRestarts=0", "Result=success", "Type=notify"]
    assert int(node.show("NFileDescriptorStore")) >= 4
    assert not re.search(r"denied|not permitted|Failed to|Unknown key", log)


def test_it_does_its_work_within_its_confinement(nodes: tuple[Lab, Booted]) -> None:
    made, node = nodes
    for tool in ("iptables-save", "ip6tables-save"):
        rules = made.hosts[0].exec(tool)
        assert "MASQUERADE --random-fully" in rules
        assert "-j FLANNEL-FWD" in rules
    status = dict(
        line.split(":\t", 1)
        for line in node.run("cat", f"/proc/{_main(node)}/status").splitlines()
        if ":\t" in line
    )
    assert status["Uid"].split()[0] != "0"
    wanted = 1 << CAP_NET_ADMIN | 1 << CAP_NET_RAW | 1 << CAP_SYS_NICE
    for kind in ("CapEff", "CapBnd"):
        assert int(status[kind], 16) == wanted
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    root = f"/proc/{_main(node)}/root"
    node.run("touch", "/tmp/of-the-host")
    assert "of-the-host" not in node.run("ls", f"{root}/tmp")
    mounts = node.run("cat", f"/proc/{_main(node)}/mountinfo")
    assert re.search(r" / / ro,", mounts)
    assert not _anybody_reads_subnet_env(node)
    program = f"/opt/pyflannel/bin/{SERVICE}"
    assert re.search(r"(?m)^ *state +ready", node.run(program, "status"))
    assert str(made.hosts[1].address) in node.run(program, "peers")


def _anybody_reads_subnet_env(node: Booted) -> bool:
    nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    read = node.run(*nobody, "cat", "/run/flannel/subnet.env", check=False)
    return "FLANNEL_SUBNET=" in read


def _thread_schedules(node: Booted) -> set[tuple[int, int]]:
    """Return nice value and policy of each thread (proc(5))."""
    # A thread may end meanwhile.
    read = f"cat /proc/{_main(node)}/task/*/stat 2>/dev/null; true"
    stats = node.run("sh", "-c", read).splitlines()
    fields = [stat.rpartition(") ")[2].split() for stat in stats]
    return {(int(x[16]), int(x[38])) for x in fields}


def test_packet_threads_have_the_priority_that_is_asked_for(nodes: tuple[Lab, Booted]) -> None:
    _, node = nodes
    assert _thread_schedules(node) == {(0, 0), (-3, 0)}
    with _drop_in(node, "RestrictRealtime=no", "Environment=FLANNELD_SCHED=realtime"):
        node.systemctl("restart", SERVICE)
        assert (0, SCHED_RR) in _thread_schedules(node)
    node.systemctl("restart", SERVICE)


def test_status_says_why_it_is_not_ready(nodes: tuple[Lab, Booted]) -> None:
    made, node = nodes
    assert node.show("StatusText") == "ready"
    bad = CONFIG.replace('"vxlan"', '"udp"')
    for config, shown in (
        (bad, 'network-config: network config: Backend.Type "udp": must be "vxlan"'),
        (CONFIG, "ready"),
    ):
        made.put_config(config)
        node.systemctl("kill", "--kill-whom=main", "--signal=HUP", SERVICE)
        wait_until(lambda: node.show("StatusText").startswith(shown), shown)  # noqa: B023 called at once
    assert f'Status: "{node.show("StatusText")}"' in node.systemctl("status", SERVICE)


def test_reload_is_a_takeover_that_loses_nothing(nodes: tuple[Lab, Booted]) -> None:
    made, node = nodes
    old, before = _main(node), _state(made, node)
    with flows(made, PACKETS_PER_SECOND, (4, 6)) as counts:
        node.systemctl("reload", SERVICE)
    assert _main(node) not in (0, old)
    assert node.show("ActiveState") == "active"
    assert node.show("NRestarts") == "0"
    assert _state(made, node) == before
    for count in counts:
        assert (count.lost, count.duplicate, count.reordered) == (0, 0, 0)


@pytest.mark.parametrize("way", ["killed", "restart"])
def test_packets_queue_while_it_is_away(nodes: tuple[Lab, Booted], way: str) -> None:
    made, node = nodes
    old, before = _main(node), _state(made, node)
    restarts = int(node.show("NRestarts"))
    kept = int(node.show("NFileDescriptorStore"))
    with flows(made, PACKETS_PER_SECOND, (4, 6)) as counts:
        if way == "killed":
            node.systemctl("kill", "--kill-whom=main", "--signal=KILL", SERVICE)
            wait_until(lambda: _is_ready_again(node, restarts + 1), "it runs again")
        else:
            node.systemctl("restart", SERVICE)
    print(f"{way}: {_away_seconds(node):.2f} s away, {counts}")
    assert _main(node) not in (0, old)
    assert int(node.show("NFileDescriptorStore")) == kept
    assert _state(made, node) == before
    # What was between the two queues at that moment goes with a process that is killed: one, or
    # what has come while it waited for a core.
    for count in counts:
        assert count.lost <= (10 if way == "killed" else 0)
        assert (count.duplicate, count.reordered) == (0, 0)


def test_the_watchdog_is_fed_and_ends_one_that_hangs(nodes: tuple[Lab, Booted]) -> None:
    made, node = nodes
    before = _state(made, node)
    with _drop_in(node, f"WatchdogSec={WATCHDOG_SECONDS}"):
        _hang(node)
    assert _state(made, node) == before
    wait_until(lambda: _reaches(made), "pings")


def _hang(node: Booted) -> None:
    """Let a successor hang, and see that systemd ends it."""
    node.systemctl("restart", SERVICE)
    restarts = int(node.show("NRestarts"))
    node.systemctl("reload", SERVICE)
    successor = _main(node)
    # MAINPID= counts as a sign of life as well, so the second one is surely the successor's own.
    seen = {node.show("WatchdogTimestampMonotonic")}

    def is_fed() -> bool:
        seen.add(node.show("WatchdogTimestampMonotonic"))
        return len(seen) > 2

    wait_until(is_fed, "the successor feeds the watchdog", 2 * WATCHDOG_SECONDS)
    assert _main(node) == successor
    node.systemctl("kill", "--kill-whom=main", "--signal=STOP", SERVICE)
    wait_until(lambda: _is_ready_again(node, restarts + 1), "it runs again")
    assert _main(node) not in (0, successor)
    assert f"Watchdog timeout (limit {WATCHDOG_SECONDS}s)!" in node.journal()


def test_nftables_within_its_confinement(nodes: tuple[Lab, Booted]) -> None:
    made, node = nodes
    host = made.hosts[0]
    made.put_config(CONFIG.replace('"Network"', '"EnableNFTables":true,"Network"'))
    try:
        node.systemctl("restart", SERVICE)
        wait_until(lambda: "flannel-ipv4" in host.exec("nft", "list", "tables"), "the table")
        for version, family in ((4, "ip"), (6, "ip6")):
            table = host.exec("nft", "list", "table", family, f"flannel-ipv{version}")
            assert "masquerade" in table
        assert "FLANNEL-FWD" not in host.exec("iptables-save") + host.exec("ip6tables-save")
    finally:
        made.put_config(CONFIG)


def test_legacy_iptables_needs_the_drop_in(nodes: tuple[Lab, Booted]) -> None:
    made, node = nodes
    host = made.hosts[0]
    _choose_iptables(node, "legacy")
    try:
        node.systemctl("restart", SERVICE, check=False)
        refused = (
            "--ip-masq: iptables-restore --noflush -w 5: Fatal: can't open lock file "
            "/run/xtables.lock: Permission denied; run as root (systemd: DynamicUser=no and "
            "ReadWritePaths=/run) or set EnableNFTables to true"
        )
        assert refused in node.journal()
        with _drop_in(node, "DynamicUser=no", "ReadWritePaths=/run"):
            node.systemctl("restart", SERVICE)
            assert _anybody_reads_subnet_env(node)
            for tool in ("iptables-legacy", "ip6tables-legacy"):
                assert "MASQUERADE --random-fully" in host.exec(f"{tool}-save", "-t", "nat")
                assert "-j FLANNEL-FWD" in host.exec(f"{tool}-save", "-t", "filter")
                host.exec(tool, "-w", "-t", "nat", "-F")
                saved = (f"{tool}-save", "-t", "nat")
                wait_until(lambda: "MASQUERADE" in host.exec(*saved), "rules are back", 2)  # noqa: B023 called at once
            assert _main(node) != 0
            wait_until(lambda: _reaches(made), "pings")
    finally:
        _choose_iptables(node, "nft")
    node.systemctl("restart", SERVICE)


def _choose_iptables(node: Booted, flavour: str) -> None:
    """Do what update-alternatives does."""
    for tool in ("iptables", "ip6tables"):
        for suffix in ("", "-save", "-restore"):
            target = f"/usr/sbin/{tool}-{flavour}{suffix}"
            node.run("ln", "-sf", target, f"/etc/alternatives/{tool}{suffix}")


def test_it_stops_cleanly_and_leaves_the_device(nodes: tuple[Lab, Booted]) -> None:
    made, node = nodes
    before = _state(made, node)
    node.systemctl("stop", SERVICE)
    shown = node.systemctl("show", "-p", "ActiveState,ExecMainStatus,Result", SERVICE).split()
    assert sorted(shown) == ["ActiveState=inactive", "ExecMainStatus=0", "Result=success"]
    assert node.show("NFileDescriptorStore") == "0"
    assert _state(made, node) == before
    assert not node.path("/run/flannel/pyflannel-1.sock").exists()
