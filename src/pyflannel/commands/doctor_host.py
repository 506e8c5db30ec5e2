"""Checks of this host: device file, capabilities, port, buffers, leftovers, firewall, settings.

Each function looks at one thing and returns what is amiss, nothing where all is well. None changes
anything, and none needs a daemon or etcd; where one runs, what it was given counts, not what this
process would be given.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from pyflannel.commands.finding import Finding, failure, warning
from pyflannel.dataplane import sysctl
from pyflannel.dataplane.netlink import Link
from pyflannel.dataplane.proc_net import processes, udp_inodes, unix_inodes
from pyflannel.dataplane.route import IPNetwork
from pyflannel.dataplane.underlay import grantable_receive_buffer, lock_name
from pyflannel.node.overlay import small_buffer_warning
from pyflannel.node.traffic import bridge_warning

TUN = Path("/dev/net/tun")

_IPTABLES = {4: "iptables", 6: "ip6tables"}
# A host that forwards IPv6 listens to router advertisements no more, unless told to.
_BESIDES_FORWARDING = {
    4: "",
    6: "; where a router gives this host its address, set accept_ra of that interface to 2 first",
}

# linux/capability.h
_CAPABILITIES = {"CAP_NET_ADMIN": 12, "CAP_NET_RAW": 13}


def check_tun() -> Iterator[Finding]:
    """The TUN clone device must be there and let itself be opened."""
    try:
        os.close(os.open(TUN, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        yield failure(
            f"{TUN} is missing, so there can be no TUN device",
            "modprobe tun, or give the container --device /dev/net/tun",
        )
    except OSError as error:
        yield failure(
            f"{TUN} cannot be opened ({error.strerror})",
            "modprobe tun and run as root; in a container allow the device 10:200",
        )


def check_capabilities(*, is_running: bool) -> Iterator[Finding]:
    """This process must be allowed what the daemon does, unless one runs, and what doctor does."""
    remedy = "run as root, or give the container --cap-add {}"
    missing = _missing_capabilities()
    if "CAP_NET_ADMIN" in missing and not is_running:
        yield failure("this process lacks CAP_NET_ADMIN", remedy.format("NET_ADMIN"))
    if "CAP_NET_RAW" in missing:
        yield warning(
            "this process lacks CAP_NET_RAW, by which doctor asks peers for an answer, and which "
            "the daemon needs for iptables of the legacy flavour",
            remedy.format("NET_RAW"),
        )


def _missing_capabilities() -> list[str]:
    status = Path("/proc/self/status").read_text()
    effective = int(re.search(r"^CapEff:\s*(\w+)", status, re.MULTILINE)[1], 16)  # type: ignore[index]  # every Linux has the line
    return [name for name, bit in _CAPABILITIES.items() if not effective >> bit & 1]


def check_receive_buffer(given: int | None) -> Iterator[Finding]:
    """A receive socket must hold a burst; `given` are the running daemon's bytes.

    That CAP_NET_ADMIN is missing is told elsewhere.
    """
    if given is None and "CAP_NET_ADMIN" not in _missing_capabilities():
        given = grantable_receive_buffer()
    if given is not None:
        yield from _warned(small_buffer_warning(given))


def _warned(sentence: str | None) -> Iterator[Finding]:
    """Yield what the daemon would warn of, a sentence with its remedy behind the last semicolon."""
    if sentence:
        said, _, remedy = sentence.rpartition("; ")
        yield warning(said, remedy)


def check_files(files: Mapping[str, Path]) -> Iterator[Finding]:
    """What the daemon keeps must find its place; `files` are by the flag that names another."""
    for flag, path in files.items():
        folder = next(x for x in path.parents if os.path.exists(x))
        disk = os.statvfs(folder)
        if not os.access(folder, os.W_OK | os.X_OK):
            why = "may not be written to"
        elif disk.f_blocks and not disk.f_bavail:
            why = "is on a disk that is full"
        else:
            continue
        found = f"{folder} {why}, so {path} cannot be written"
        # What stands there is used, until it has to be changed.
        say = warning if os.path.exists(path) else failure
        yield say(found, f"make room or mend the mount, or choose another place with {flag}")


def check_port(port: int, *, is_running: bool) -> Iterator[Finding]:
    """Nobody but the running daemon may hold the UDP port."""
    inodes = udp_inodes(port)
    if not inodes or is_running:
        return
    holders = processes(inodes)
    if unix_inodes(f"@{lock_name(port, 4)}"):
        yield warning(
            f"a pyflannel-udp serves UDP port {port} here and cannot be asked, so how it does is "
            "not known",
            "run doctor where that runs, as by docker exec, or name its folder with --control-dir",
        )
        return
    yield failure(
        f"UDP port {port} is held by {', '.join(holders) or 'a process that is not visible here'}",
        f"stop it; `ss -uanp sport = :{port}` on the host shows it",
    )


def check_devices(links: Sequence[Link], devices: Collection[str], port: int) -> Iterator[Finding]:
    """The kernel must have no vxlan device on our port, and nothing else of our devices' names."""
    for link in links:
        if link.kind == "vxlan" and link.name in devices:
            yield failure(
                f"{link.name} is a kernel vxlan device on UDP port {link.vxlan_port}, left by "
                "flanneld or in use by it",
                f"stop flanneld, then `ip link del {link.name}` or start with "
                "--replace-kernel-device",
            )
        elif link.kind == "vxlan" and link.vxlan_port == port and link.up:
            yield failure(
                f"{link.name} is a kernel vxlan device on UDP port {port}, which ours needs",
                f"stop what made it (flanneld?), then `ip link del {link.name}`, or set another "
                "Backend.Port in etcd",
            )
        elif link.name in devices and link.kind != "tun":
            yield failure(
                f"{link.name} exists and is a {link.kind or 'hardware'} device",
                f"ip link del {link.name}",
            )


def check_firewall_tools(versions: Collection[int], *, nftables: bool) -> Iterator[Finding]:
    """What writes the masquerade and forward rules must be installed."""
    tools = ["nft"] if nftables else [f"{_IPTABLES[version]}-restore" for version in versions]
    for tool in tools:
        if shutil.which(tool) is None:
            other = "false" if nftables else "true"
            yield warning(
                f"{tool} is not installed, so masquerade and forward rules cannot be written",
                f"install {'nftables' if nftables else 'iptables'}, or set EnableNFTables to "
                f"{other}",
            )


def check_firewall_input(versions: Collection[int], port: int) -> Iterator[Finding]:
    """The host's firewall must let the VXLAN port in; told from what it says about this port."""
    for version in versions:
        for flavour in ("nft", "legacy"):
            tool = f"{_IPTABLES[version]}-{flavour}"
            yield from _judge_input(_output(tool, "-S", "INPUT"), "-P INPUT DROP", port, tool)
    for chain in re.findall(r"chain [^{]*\{[^}]*\}", _output("nft", "list", "ruleset")):
        # Chains of iptables-nft were looked at above.
        if re.search(r"hook input .*policy", chain) and "chain INPUT " not in chain:
            yield from _judge_input(chain, "policy drop", port, "nft")


def _judge_input(rules: str, closed: str, port: int, tool: str) -> Iterator[Finding]:
    about = [x.strip() for x in rules.splitlines() if re.search(rf"\b{port}\b", x)]
    refusing = [x for x in about if re.search(r"\b(DROP|REJECT|drop|reject)\b", x)]
    remedy = f"accept UDP port {port} from the other nodes"
    if refusing:
        yield failure(f"{tool} closes UDP port {port}: {refusing[0]}", remedy)
    elif closed in rules and not about:
        yield warning(
            f"{tool}: what comes in is dropped by default, and no rule names UDP port {port}",
            remedy,
        )


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def check_forwarding(versions: Collection[int]) -> Iterator[Finding]:
    """The host must forward packets of its containers."""
    for version in versions:
        path = sysctl.FORWARDING[version]
        if sysctl.setting(path) == 0:
            yield warning(
                f"{sysctl.key(path)} is 0: this host does not forward packets to or from its "
                "containers",
                f"sysctl -w {sysctl.key(path)}=1{_BESIDES_FORWARDING[version]}",
            )


def check_ipv6() -> Iterator[Finding]:
    """The kernel must have IPv6, and it must be switched on for the devices to come."""
    if sysctl.ROOT.exists() and not (sysctl.ROOT / "ipv6/conf").exists():
        yield failure(
            "this kernel has no IPv6, and the network is dual stack",
            "boot it without ipv6.disable=1, or set EnableIPv6 to false",
        )
    for name in ("all", "default"):
        path = f"ipv6/conf/{name}/disable_ipv6"
        if sysctl.setting(path) == 1:
            yield failure(
                f"{sysctl.key(path)} is 1, so our device can have no IPv6 address",
                f"sysctl -w {sysctl.key(path)}=0",
            )
            return


def check_rp_filter(device: str, interface: str | None) -> Iterator[Finding]:
    """Strict reverse path filtering drops what comes back by another way; IPv6 has none."""
    for name in filter(None, (device, interface)):
        paths = ("ipv4/conf/all/rp_filter", f"ipv4/conf/{name}/rp_filter")
        if max(sysctl.setting(path) or 0 for path in paths) == 1:
            yield warning(
                f"rp_filter is 1 (strict) on {name}: packets whose way back is another interface "
                "are dropped, as with DirectRouting or several uplinks",
                f"sysctl -w {' '.join(f'{sysctl.key(path)}=2' for path in paths)}",
            )


def check_linkdown(devices: Mapping[int, str]) -> Iterator[Finding]:
    """While the daemon is away its routes must not be passed over for the default route."""
    for version, device in devices.items():
        for name in ("all", device):
            path = f"ipv{version}/conf/{name}/ignore_routes_with_linkdown"
            if sysctl.setting(path) == 1:
                yield warning(
                    f"{sysctl.key(path)} is 1: while the daemon is away, packets to other nodes' "
                    "containers leave unencapsulated by the default route",
                    f"sysctl -w {sysctl.key(path)}=0",
                )
                break


def check_bridge(networks: Sequence[IPNetwork]) -> Iterator[Finding]:
    """Rules must apply to packets that cross a bridge."""
    yield from _warned(bridge_warning([(network, network) for network in networks]))
