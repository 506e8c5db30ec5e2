"""The command line and the FLANNELD_* variables as one frozen value.

Go's flag syntax, because existing unit files are written in it: one or two dashes, value behind
`=` or as the next word, booleans only with `=`. `flags` holds the table. Source: spec section 2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any

from pyflannel.command_line.flags import FLAGS, REMOVED, UNSERVED, Flag
from pyflannel.command_line.usage import help_text
from pyflannel.control.subnet_file import variables_untrusted
from pyflannel.dataplane.offload import Offload
from pyflannel.dataplane.refusal import Refusal
from pyflannel.dataplane.route import IPAddress, IPNetwork


class UsageError(Exception):
    """The command line cannot be read; exit code 2."""


class HelpRequested(Exception):
    """`--help`: `str()` is the text."""


class VersionRequested(Exception):
    """`--version`."""


_BY_NAME = {flag.name: flag for flag in FLAGS}


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
    iface_can_reach: IPAddress | None
    public_ip: IPv4Address | None
    public_ipv6: IPv6Address | None
    subnet_file: Path
    flannel_mtu: int | None
    subnet_lease_renew_margin: int
    release_lease_on_exit: bool
    options_file: Path | None
    state_dir: Path
    control_dir: Path
    takeover: bool
    replace_kernel_device: bool
    anti_spoofing: str
    peer_source: tuple[tuple[IPNetwork, IPNetwork], ...]
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
    healthz_ip: IPAddress
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
            why = REMOVED.get(name)
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
        flag = _BY_NAME["options-file"]
        path = flag.kind.read(environ.get(flag.variable, ""))
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
            value = flag.kind.read(text)
        except ValueError as error:
            raise UsageError(f"--{flag.name} {text!r}: {error}") from None
        values[flag.field] = (*values.get(flag.field, ()), value) if flag.repeatable else value
    variables = {**environ, **_options_file(values.get("options_file"), environ)}
    for flag in FLAGS:
        text = variables.get(flag.variable, "")
        if flag.field in values or not text:
            continue
        try:
            value = flag.kind.read(text)
        except ValueError as error:
            notes.append(f"{flag.variable}={text!r} is ignored: {error}")
            continue
        values[flag.field] = (value,) if flag.repeatable else value
    given = frozenset(values)
    for flag in FLAGS:
        if flag.field not in values:
            values[flag.field] = () if flag.repeatable else flag.kind.read(flag.default)
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
        for field, sentence in UNSERVED.items()
        if field in options.given and getattr(options, field)
    )
