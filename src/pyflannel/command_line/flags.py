"""The daemon's flags: one table, from which parsing, help, manual and completion follow.

flannel's flags keep flannel's names and defaults (spec section 2.1).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from pathlib import Path
from typing import Any

from pyflannel.dataplane.offload import parse_offload
from pyflannel.dataplane.route import IPAddress, IPNetwork


@dataclass(frozen=True, slots=True)
class Kind:
    """How a value is read, and what help calls it: `a|b` are the words to choose from."""

    read: Callable[[str], Any]
    shown: str


@dataclass(frozen=True, slots=True)
class Flag:
    """One flag: what its value is, its default as text, what help says, and under which task."""

    name: str
    kind: Kind
    default: str
    help: str
    group: str
    repeatable: bool = False

    @property
    def field(self) -> str:
        """Name of the field in Options."""
        return self.name.replace("-", "_")

    @property
    def variable(self) -> str:
        """Name of the environment variable."""
        return "FLANNELD_" + self.field.upper()

    @property
    def is_boolean(self) -> bool:
        """Whether the flag takes no separate value."""
        return self.kind is SWITCH

    @property
    def explained(self) -> str:
        """What help, manual and completion say of it."""
        again = "; may be repeated" if self.repeatable else ""
        default = f" (default {self.default})" if self.default else ""
        return f"{self.help}{again}{default}"


_TRUE, _FALSE = ("1", "t", "T", "TRUE", "true", "True"), ("0", "f", "F", "FALSE", "false", "False")


def _boolean(text: str) -> bool:
    if text not in _TRUE + _FALSE:
        raise ValueError("must be true or false")
    return text in _TRUE


def _number(low: int, high: int, shown: str = "N") -> Kind:
    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise ValueError("must be a whole number") from None
        if not low <= value <= high:
            raise ValueError(f"must be in {low}..{high}")
        return value

    return Kind(read, shown)


def _one_of(*words: str) -> Kind:
    def read(text: str) -> str:
        if text not in words:
            raise ValueError(f"must be one of {', '.join(words)}")
        return text

    return Kind(read, "|".join(words))


def _optional(kind: Kind) -> Kind:
    return Kind(lambda text: kind.read(text) if text else None, kind.shown)


def _ip(text: str) -> IPAddress:
    try:
        return ip_address(text)
    except ValueError:
        raise ValueError("must be an IP address") from None


def _ipv4(text: str) -> IPv4Address:
    try:
        return IPv4Address(text)
    except ValueError:
        raise ValueError("must be an IPv4 address") from None


def _ipv6(text: str) -> IPv6Address:
    try:
        return IPv6Address(text)
    except ValueError:
        raise ValueError("must be an IPv6 address") from None


def _endpoints(text: str) -> tuple[str, ...]:
    endpoints = tuple(part.strip() for part in text.split(",") if part.strip())
    for endpoint in endpoints:
        scheme, found, rest = endpoint.partition("://")
        if not found or scheme not in ("http", "https") or not rest.strip("/"):
            raise ValueError(f"{endpoint!r} must be http://HOST:PORT or https://HOST:PORT")
    if not endpoints:
        raise ValueError("must name at least one endpoint")
    return endpoints


def _peer_source(text: str) -> tuple[IPNetwork, IPNetwork]:
    source, _, subnet = text.partition("=")
    try:
        pair = ip_network(source), ip_network(subnet)
        if pair[0].version != pair[1].version:
            raise ValueError
        return pair
    except ValueError:
        raise ValueError("must be CIDR=SUBNET, such as 192.0.2.7/32=10.5.72.0/24") from None


SWITCH = Kind(_boolean, "")
"""True or false, with `=` only."""
_TEXT = Kind(str, "TEXT")
FILE, FOLDER = Kind(Path, "FILE"), Kind(Path, "DIR")
INTERFACE = Kind(str, "IFACE")
_OPTIONAL_FILE = _optional(FILE)
_IPV4 = _optional(Kind(_ipv4, "ADDRESS"))
_IPV6 = _optional(Kind(_ipv6, "ADDRESS"))
_IP = _optional(Kind(_ip, "ADDRESS"))
_PORT = _number(0, 65535, "PORT")
_INTEGER = _number(-(1 << 31), 1 << 31)

_ETCD = "Reach etcd"
_IFACE = "Choose the interface and the address"
_NODE = "Keep the lease and this node's files"
_UPGRADE = "Migrate and upgrade"
_TRUST = "Check who sent a packet"
_DATA = "Move packets"
_TRAFFIC = "Write traffic rules"
_HEALTH = "Tell health and metrics"
_LOG = "Log"
_KUBE = "Kubernetes"

FLAGS: tuple[Flag, ...] = (
    Flag(
        "etcd-endpoints",
        Kind(_endpoints, "URL,..."),
        "http://127.0.0.1:4001,http://127.0.0.1:2379",
        "comma-separated etcd endpoints",
        _ETCD,
    ),
    Flag("etcd-prefix", _TEXT, "/coreos.com/network", "prefix of the network's keys", _ETCD),
    Flag("etcd-cafile", _OPTIONAL_FILE, "", "CA that signed etcd's certificate", _ETCD),
    Flag("etcd-certfile", _OPTIONAL_FILE, "", "our client certificate", _ETCD),
    Flag("etcd-keyfile", _OPTIONAL_FILE, "", "key of our client certificate", _ETCD),
    Flag("etcd-username", _TEXT, "", "user for etcd's authentication", _ETCD),
    Flag("etcd-password", _TEXT, "", "password of that user", _ETCD),
    Flag(
        "iface", INTERFACE, "", "interface name or address that carries the overlay", _IFACE, True
    ),
    Flag(
        "iface-regex",
        Kind(str, "REGEX"),
        "",
        "regular expression on addresses, then names",
        _IFACE,
        True,
    ),
    Flag("iface-can-reach", _IP, "", "use the route to this address", _IFACE),
    Flag("public-ip", _IPV4, "", "address that peers are told", _IFACE),
    Flag("public-ipv6", _IPV6, "", "IPv6 address that peers are told", _IFACE),
    Flag("subnet-file", FILE, "/run/flannel/subnet.env", "where to write the subnet", _NODE),
    Flag(
        "flannel-mtu",
        _optional(_number(68, 65535)),
        "",
        "FLANNEL_MTU in the subnet file; without it the smaller of all families",
        _NODE,
    ),
    Flag(
        "subnet-lease-renew-margin",
        _INTEGER,
        "60",
        "minutes before its end at which the lease is renewed, 1..1439",
        _NODE,
    ),
    Flag("release-lease-on-exit", SWITCH, "false", "give the lease back at exit", _NODE),
    Flag(
        "options-file",
        _OPTIONAL_FILE,
        "",
        "file of FLANNELD_* lines; they outweigh the environment and are re-read on SIGHUP",
        _NODE,
    ),
    Flag("state-dir", FOLDER, "/var/lib/pyflannel-udp", "where the VTEP MAC is kept", _NODE),
    Flag(
        "control-dir",
        FOLDER,
        "/run/flannel",
        "where the socket for status and reload is, pyflannel-<VNI>.sock",
        _NODE,
    ),
    Flag(
        "takeover",
        SWITCH,
        "false",
        "take over from the running daemon without losing a packet, for an upgrade",
        _UPGRADE,
    ),
    Flag(
        "replace-kernel-device",
        SWITCH,
        "false",
        "delete a kernel device flannel.<VNI>",
        _UPGRADE,
    ),
    Flag(
        "anti-spoofing",
        _one_of("off", "log", "enforce"),
        "enforce",
        "accept what the kernel's device accepts, only tell what is spoofed, or drop it",
        _TRUST,
    ),
    Flag(
        "peer-source",
        Kind(_peer_source, "CIDR=SUBNET"),
        "",
        "the node of SUBNET may send from CIDR",
        _TRUST,
        True,
    ),
    Flag(
        "reserved-bits",
        _one_of("strict", "ignore"),
        "strict",
        "packets with reserved VXLAN bits: strict drops, ignore accepts",
        _TRUST,
    ),
    Flag("source-ports", _number(1, 64), "16", "UDP source ports flows are spread over", _DATA),
    Flag("tun-queue-length", _number(1, 1_000_000), "5000", "packets the TUN queues", _DATA),
    Flag(
        "offload",
        Kind(parse_offload, "auto|off|tso,uso,gso,gro"),
        "auto",
        "what the host has, nothing, or those of the TUN (tso, uso) and UDP (gso, gro) to force",
        _DATA,
    ),
    Flag(
        "workers",
        _one_of("auto", "0", "1", "2"),
        "auto",
        "threads that move packets; 0: the event loop; auto: 1, and up to 3 under load",
        _DATA,
    ),
    Flag(
        "sched",
        _one_of("normal", "raised", "realtime"),
        "raised",
        "priority of these threads: raised is 3 to 8 nice steps above ours, realtime SCHED_RR",
        _DATA,
    ),
    Flag(
        "poll-us",
        _number(0, 1_000_000, "MICROSECONDS"),
        "0",
        "how long to poll before sleeping, leaving the core to others that want it",
        _DATA,
    ),
    Flag("tun-queues", _number(1, 255), "64", "queues of the TUN, served in turns", _DATA),
    Flag("ip-masq", SWITCH, "false", "masquerade; told in subnet.env", _TRAFFIC),
    Flag("ip-masq-fully-random-disable", SWITCH, "false", "no --random-fully", _TRAFFIC),
    Flag("iptables-forward-rules", SWITCH, "true", "accept forwarded packets", _TRAFFIC),
    Flag(
        "iptables-resync",
        _number(1, 86400, "SECONDS"),
        "5",
        "time between full checks of the rules",
        _TRAFFIC,
    ),
    Flag("ip-blackhole-route", SWITCH, "false", "blackhole route for our subnet", _TRAFFIC),
    Flag(
        "healthz-ip",
        Kind(ip_address, "ADDRESS"),
        "0.0.0.0",
        "address of /healthz, /readyz, /metrics",
        _HEALTH,
    ),
    Flag("healthz-port", _PORT, "0", "their port; 0: off", _HEALTH),
    Flag("metrics-port", _PORT, "0", "one more port for them", _HEALTH),
    Flag("metrics-per-peer", SWITCH, "true", "series of each peer on /metrics", _HEALTH),
    Flag("v", _INTEGER, "0", "verbosity; 2 shows details", _LOG),
    Flag("log-format", _one_of("text", "json"), "text", "how lines are written", _LOG),
    Flag("vmodule", _TEXT, "", "ignored", _LOG),
    Flag("log_backtrace_at", _TEXT, "", "ignored", _LOG),
    Flag("version", SWITCH, "false", "print the version and exit", _LOG),
    Flag("kube-subnet-mgr", SWITCH, "false", "not in this version", _KUBE),
    Flag("kube-api-url", _TEXT, "", "not in this version", _KUBE),
    Flag("kube-annotation-prefix", _TEXT, "flannel.alpha.coreos.com", "not in this version", _KUBE),
    Flag("kubeconfig-file", _TEXT, "", "not in this version", _KUBE),
    Flag("net-config-path", _TEXT, "/etc/kube-flannel/net-conf.json", "not in this version", _KUBE),
    Flag("set-node-network-unavailable", SWITCH, "true", "not in this version", _KUBE),
)

REMOVED = {
    "networks": "one daemon serves one network; run one for each --etcd-prefix",
    "listen": "flannel has no server mode any more; point --etcd-endpoints at etcd",
    "remote": "flannel has no client mode any more; point --etcd-endpoints at etcd",
    "networks-dir": "one daemon serves one network; run one for each --etcd-prefix",
}
"""Flags that flannel once had, each with what to do instead."""

UNSERVED = {
    "vmodule": "--vmodule is ignored; use -v",
    "log_backtrace_at": "--log_backtrace_at is ignored",
}
"""Fields whose flags are accepted without doing it, each with a sentence."""
