"""The command line and the FLANNELD_* variables as one frozen value.

Go's flag syntax, because existing unit files are written in it: one or two dashes, value behind
`=` or as the next word, booleans only with `=`. One table holds every flag; help, parsing and the
environment follow from it. Source: spec section 2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, ip_address
from pathlib import Path
from typing import Any, Union

from pyflannel.control.subnet_file import variables_untrusted
from pyflannel.dataplane.offload import Offload, parse_offload
from pyflannel.dataplane.refusal import Refusal


class UsageError(Exception):
    """The command line cannot be read; exit code 2."""


class HelpRequested(Exception):
    """`--help`: `str()` is the text."""


class VersionRequested(Exception):
    """`--version`."""


@dataclass(frozen=True, slots=True)
class Flag:
    """One flag: how its value is read, its default as text, and what help says."""

    name: str
    read: Callable[[str], Any]
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
        return self.read is _boolean


_TRUE, _FALSE = ("1", "t", "T", "TRUE", "true", "True"), ("0", "f", "F", "FALSE", "false", "False")


def _boolean(text: str) -> bool:
    if text not in _TRUE + _FALSE:
        raise ValueError("must be true or false")
    return text in _TRUE


def _number(low: int, high: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise ValueError("must be a whole number") from None
        if not low <= value <= high:
            raise ValueError(f"must be in {low}..{high}")
        return value

    return read


def _one_of(*words: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in words:
            raise ValueError(f"must be one of {', '.join(words)}")
        return text

    return read


def _optional(read: Callable[[str], Any]) -> Callable[[str], Any]:
    return lambda text: read(text) if text else None


def _ipv4(text: str) -> IPv4Address:
    try:
        return IPv4Address(text)
    except ValueError:
        raise ValueError("must be an IPv4 address") from None


def _endpoints(text: str) -> tuple[str, ...]:
    endpoints = tuple(part.strip() for part in text.split(",") if part.strip())
    for endpoint in endpoints:
        scheme, found, rest = endpoint.partition("://")
        if not found or scheme not in ("http", "https") or not rest.strip("/"):
            raise ValueError(f"{endpoint!r} must be http://HOST:PORT or https://HOST:PORT")
    if not endpoints:
        raise ValueError("must name at least one endpoint")
    return endpoints


def _peer_source(text: str) -> tuple[IPv4Network, IPv4Network]:
    source, found, subnet = text.partition("=")
    try:
        if not found:
            raise ValueError
        return IPv4Network(source), IPv4Network(subnet)
    except ValueError:
        raise ValueError("must be CIDR=SUBNET, such as 192.0.2.7/32=10.5.72.0/24") from None


_ETCD, _IFACE, _NODE = "etcd", "interface and address", "node"
_TRAFFIC, _KUBE = "traffic rules", "Kubernetes"
_HEALTH, _DATA, _LOG = "health", "data plane", "log"

_OPTIONAL_PATH = _optional(Path)
_ENDPOINTS = "http://127.0.0.1:4001,http://127.0.0.1:2379"

FLAGS: tuple[Flag, ...] = (
    Flag("etcd-endpoints", _endpoints, _ENDPOINTS, "comma-separated etcd endpoints", _ETCD),
    Flag("etcd-prefix", str, "/coreos.com/network", "prefix of the network's keys", _ETCD),
    Flag("etcd-cafile", _OPTIONAL_PATH, "", "CA that signed etcd's certificate", _ETCD),
    Flag("etcd-certfile", _OPTIONAL_PATH, "", "our client certificate", _ETCD),
    Flag("etcd-keyfile", _OPTIONAL_PATH, "", "key of our client certificate", _ETCD),
    Flag("etcd-username", str, "", "user for etcd's authentication", _ETCD),
    Flag("etcd-password", str, "", "password of that user", _ETCD),
    Flag("iface", str, "", "interface name or address that carries the overlay", _IFACE, True),
    Flag("iface-regex", str, "", "regular expression on addresses, then names", _IFACE, True),
    Flag("iface-can-reach", _optional(_ipv4), "", "use the route to this address", _IFACE),
    Flag("public-ip", _optional(_ipv4), "", "address that peers are told", _IFACE),
    Flag("public-ipv6", _optional(IPv6Address), "", "IPv6 address that peers are told", _IFACE),
    Flag("subnet-file", Path, "/run/flannel/subnet.env", "where to write the subnet", _NODE),
    Flag(
        "subnet-lease-renew-margin",
        _number(-(1 << 31), 1 << 31),
        "60",
        "minutes before its end at which the lease is renewed, 1..1439",
        _NODE,
    ),
    Flag("release-lease-on-exit", _boolean, "false", "give the lease back at exit", _NODE),
    Flag(
        "options-file",
        _OPTIONAL_PATH,
        "",
        "file of FLANNELD_* lines; they outweigh the environment and are re-read on SIGHUP",
        _NODE,
    ),
    Flag("state-dir", Path, "/var/lib/pyflannel-udp", "where the VTEP MAC is kept", _NODE),
    Flag(
        "control-dir",
        Path,
        "/run/flannel",
        "where the socket for status and reload is, pyflannel-<VNI>.sock",
        _NODE,
    ),
    Flag(
        "takeover",
        _boolean,
        "false",
        "take over from the running daemon without losing a packet, for an upgrade",
        _NODE,
    ),
    Flag("replace-kernel-device", _boolean, "false", "delete a kernel device flannel.<VNI>", _NODE),
    Flag(
        "anti-spoofing",
        _one_of("off", "log", "enforce"),
        "enforce",
        "check who sent a packet: off, log or enforce",
        _DATA,
    ),
    Flag(
        "peer-source",
        _peer_source,
        "",
        "CIDR=SUBNET: the node of SUBNET may send from CIDR",
        _DATA,
        True,
    ),
    Flag(
        "reserved-bits",
        _one_of("strict", "ignore"),
        "strict",
        "packets with reserved VXLAN bits: strict drops, ignore accepts",
        _DATA,
    ),
    Flag("source-ports", _number(1, 64), "16", "UDP source ports flows are spread over", _DATA),
    Flag("tun-queue-length", _number(1, 1_000_000), "5000", "packets the TUN queues", _DATA),
    Flag(
        "offload",
        parse_offload,
        "auto",
        "auto, off, or of tso,uso (TUN) and gso,gro (UDP) those to force",
        _DATA,
    ),
    Flag(
        "workers",
        _one_of("0", "1", "2", "auto"),
        "auto",
        "threads that move packets; 0: the event loop; auto: 1, and 2 under load",
        _DATA,
    ),
    Flag(
        "sched",
        _one_of("normal", "raised", "realtime"),
        "raised",
        "priority of these threads: normal, raised (nice -20) or realtime (SCHED_RR)",
        _DATA,
    ),
    Flag("poll-us", _number(0, 1_000_000), "0", "microseconds to poll before sleeping", _DATA),
    Flag("tun-queues", _number(1, 64), "32", "queues of the TUN, served in turns", _DATA),
    Flag("ip-masq", _boolean, "false", "masquerade; told in subnet.env", _TRAFFIC),
    Flag("ip-masq-fully-random-disable", _boolean, "false", "no --random-fully", _TRAFFIC),
    Flag("iptables-forward-rules", _boolean, "true", "accept forwarded packets", _TRAFFIC),
    Flag("iptables-resync", _number(1, 86400), "5", "seconds between checks of rules", _TRAFFIC),
    Flag("ip-blackhole-route", _boolean, "false", "blackhole route for our subnet", _TRAFFIC),
    Flag("healthz-ip", ip_address, "0.0.0.0", "address of /healthz, /readyz, /metrics", _HEALTH),
    Flag("healthz-port", _number(0, 65535), "0", "their port; 0: off", _HEALTH),
    Flag("metrics-port", _number(0, 65535), "0", "one more port for them", _HEALTH),
    Flag("metrics-per-peer", _boolean, "true", "series of each peer on /metrics", _HEALTH),
    Flag("kube-subnet-mgr", _boolean, "false", "not in this version", _KUBE),
    Flag("kube-api-url", str, "", "not in this version", _KUBE),
    Flag("kube-annotation-prefix", str, "flannel.alpha.coreos.com", "not in this version", _KUBE),
    Flag("kubeconfig-file", str, "", "not in this version", _KUBE),
    Flag("net-config-path", str, "/etc/kube-flannel/net-conf.json", "not in this version", _KUBE),
    Flag("set-node-network-unavailable", _boolean, "true", "not in this version", _KUBE),
    Flag("v", _number(-(1 << 31), 1 << 31), "0", "verbosity; 2 shows details", _LOG),
    Flag("log-format", _one_of("text", "json"), "text", "text or json", _LOG),
    Flag("vmodule", str, "", "ignored", _LOG),
    Flag("log_backtrace_at", str, "", "ignored", _LOG),
    Flag("version", _boolean, "false", "print the version and exit", _LOG),
)

_BY_NAME = {flag.name: flag for flag in FLAGS}

_REMOVED = {
    "networks": "one daemon serves one network; run one for each --etcd-prefix",
    "listen": "flannel has no server mode any more; point --etcd-endpoints at etcd",
    "remote": "flannel has no client mode any more; point --etcd-endpoints at etcd",
    "networks-dir": "one daemon serves one network; run one for each --etcd-prefix",
}

_UNSERVED = {
    "public_ipv6": "--public-ipv6: this version carries IPv4 only",
    "vmodule": "--vmodule is ignored; use -v",
    "log_backtrace_at": "--log_backtrace_at is ignored",
}


@dataclass(frozen=True, slots=True)
class Options:
    """Every flag's value; `given` names the fields set by flag or variable.

    `notes` are sentences about variables that could not be used.
    """

    etcd_endpoints: tuple[str, ...]
    etcd_prefix: str
    etcd_cafile: Path | None
    etcd_certfile: Path | None
    etcd_keyfile: Path | None
    etcd_username: str
    etcd_password: str
    iface: tuple[str, ...]
    iface_regex: tuple[str, ...]
    iface_can_reach: IPv4Address | None
    public_ip: IPv4Address | None
    public_ipv6: IPv6Address | None
    subnet_file: Path
    subnet_lease_renew_margin: int
    release_lease_on_exit: bool
    options_file: Path | None
    state_dir: Path
    control_dir: Path
    takeover: bool
    replace_kernel_device: bool
    anti_spoofing: str
    peer_source: tuple[tuple[IPv4Network, IPv4Network], ...]
    reserved_bits: str
    source_ports: int
    tun_queue_length: int
    offload: Offload | None
    workers: str
    sched: str
    poll_us: int
    tun_queues: int
    ip_masq: bool
    ip_masq_fully_random_disable: bool
    iptables_forward_rules: bool
    iptables_resync: int
    ip_blackhole_route: bool
    healthz_ip: Union[IPv4Address, IPv6Address]
    healthz_port: int
    metrics_port: int
    metrics_per_peer: bool
    kube_subnet_mgr: bool
    kube_api_url: str
    kube_annotation_prefix: str
    kubeconfig_file: str
    net_config_path: str
    set_node_network_unavailable: bool
    v: int
    log_format: str
    vmodule: str
    log_backtrace_at: str
    given: frozenset[str]
    notes: tuple[str, ...] = ()


def help_text() -> str:
    """Return the text of `--help`: every flag with its default, by group."""
    lines = [
        "Usage: pyflannel-udp [FLAGS]",
        "       pyflannel-udp status | peers | leases | trace ADDRESS   (each has --help)",
        "       pyflannel-udp doctor                  (what is amiss on this host)",
        "       pyflannel-udp docker-opts [OPTIONS]   (see docker-opts -h)",
        "",
        "Joins a flannel network (backend vxlan, etcd v3) without a kernel vxlan device.",
        "Each flag can also be set by a variable: FLANNELD_ETCD_PREFIX for --etcd-prefix.",
    ]
    for group in dict.fromkeys(flag.group for flag in FLAGS):
        lines += ["", f"{group[0].upper()}{group[1:]}:"]
        for flag in FLAGS:
            if flag.group != group:
                continue
            default = f" (default {flag.default})" if flag.default else ""
            again = "; may be repeated" if flag.repeatable else ""
            lines.append(f"  --{flag.name:<29} {flag.help}{again}{default}")
    return "\n".join(lines)


def _words(argv: Sequence[str]) -> list[tuple[Flag, str]]:
    """Split the command line into flags and their values, as Go's flag package does."""
    found: list[tuple[Flag, str]] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        if word == "--" or not word.startswith("-") or word == "-":
            rest = ([] if word == "--" else [word]) + words
            if rest:
                raise UsageError(f"{rest[0]!r} is not a flag; pyflannel-udp takes flags only")
            break
        name, equals, value = word.removeprefix("-").removeprefix("-").partition("=")
        if name in ("help", "h"):
            raise HelpRequested(help_text())
        flag = _BY_NAME.get(name)
        if flag is None:
            why = _REMOVED.get(name)
            raise UsageError(f"--{name} was removed: {why}" if why else f"unknown flag --{name}")
        if not equals:
            if flag.is_boolean:
                value = "true"
            elif words:
                value = words.pop(0)
            else:
                raise UsageError(f"--{name} needs a value")
        found.append((flag, value))
    return found


def _options_file(path: Path | None, environ: Mapping[str, str]) -> Mapping[str, str]:
    """Return the variables of the options file, if there is to be one."""
    if path is None:
        path = _OPTIONAL_PATH(environ.get(_BY_NAME["options-file"].variable, ""))
    if path is None:
        return {}
    try:
        return variables_untrusted(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise Refusal(f"--options-file {path}: cannot be read ({error})") from None


def parse_options(argv: Sequence[str], environ: Mapping[str, str]) -> Options:
    """Read flags, then variables for flags that were not given.

    Raises UsageError, HelpRequested, VersionRequested, or Refusal for an options file that cannot
    be read and for a renew margin that flannel would refuse as well.
    """
    values: dict[str, Any] = {}
    notes: list[str] = []
    for flag, text in _words(argv):
        try:
            value = flag.read(text)
        except ValueError as error:
            raise UsageError(f"--{flag.name} {text!r}: {error}") from None
        values[flag.field] = (*values.get(flag.field, ()), value) if flag.repeatable else value
    variables = {**environ, **_options_file(values.get("options_file"), environ)}
    for flag in FLAGS:
        text = variables.get(flag.variable, "")
        if flag.field in values or not text:
            continue
        try:
            value = flag.read(text)
        except ValueError as error:
            notes.append(f"{flag.variable}={text!r} is ignored: {error}")
            continue
        values[flag.field] = (value,) if flag.repeatable else value
    given = frozenset(values)
    for flag in FLAGS:
        if flag.field not in values:
            values[flag.field] = () if flag.repeatable else flag.read(flag.default)
    if values.pop("version"):
        raise VersionRequested
    margin = values["subnet_lease_renew_margin"]
    if not 1 <= margin <= 1439:
        raise Refusal(f"--subnet-lease-renew-margin {margin}: must be in 1..1439 minutes")
    return Options(**values, given=given, notes=tuple(notes))


def takes_next_word(word: str) -> bool:
    """Whether a word of the command line is a flag whose value is the next word."""
    flag = _BY_NAME.get(word.removeprefix("-").removeprefix("-"))
    return word.startswith("-") and flag is not None and not flag.is_boolean


def unserved_flags(options: Options) -> tuple[str, ...]:
    """Return a sentence for each given flag that this version accepts without doing it."""
    return tuple(
        sentence
        for field, sentence in _UNSERVED.items()
        if field in options.given and getattr(options, field)
    )
