"""The sub-commands as one table, and `--help` made of it and of `flags`. Does no I/O."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

from pyflannel.command_line.flags import FLAGS, Flag

WIDTH = 100
TEXT_COLUMN = 34

ABOUT = "Joins a flannel network (backend vxlan, etcd v3) without a kernel vxlan device."
VARIABLES = (
    "Each flag can also be set by a variable: FLANNELD_ETCD_PREFIX for --etcd-prefix. One or two\n"
    "dashes are the same, and so are `--flag value` and `--flag=value`; a flag without a value is\n"
    "switched off by `--flag=false`."
)
EXIT_CODES = "Exit codes: 0 stopped, 1 refused, 2 the command line cannot be read."


@dataclass(frozen=True, slots=True)
class OwnFlag:
    """A flag that a sub-command has beside the daemon's."""

    spelled: str
    value: str
    help: str

    @property
    def left(self) -> str:
        """How it is written."""
        return f"{self.spelled} {self.value}".rstrip()

    @property
    def choices(self) -> tuple[str, ...]:
        """The values there are, if they can be told."""
        return tuple(self.value.split("|")) if "|" in self.value else ()


@dataclass(frozen=True, slots=True)
class Subcommand:
    """One sub-command as help, manual and completion tell it.

    `arguments` are words that are no flags: a name in capitals, or what there is to choose from.
    """

    name: str
    group: str
    arguments: str
    summary: str
    details: str
    flags: tuple[OwnFlag, ...] = ()
    takes_daemon_flags: bool = False

    @property
    def choices(self) -> tuple[str, ...]:
        """The words that its argument can be, if they can be told."""
        return tuple(self.arguments.split("|")) if self.arguments.islower() else ()

    @property
    def synopsis(self) -> str:
        """Name and arguments."""
        return f"{self.name} {self.arguments}".rstrip()


_LOOK, _OPERATE, _INSTALL = "See how a node is", "Operate a node", "Install"

_VNI = OwnFlag("--vni", "N", "choose one of several daemons on this host")
_ASK = (OwnFlag("--json", "", "print JSON instead of a table"), _VNI)

SUBCOMMANDS: tuple[Subcommand, ...] = (
    Subcommand(
        "status",
        _LOOK,
        "",
        "lease, etcd, devices and peers of the daemon on this host",
        "Exit code 1 while the node is not ready.",
        _ASK,
        takes_daemon_flags=True,
    ),
    Subcommand(
        "peers",
        _LOOK,
        "",
        "every peer with its counters",
        "Packets and bytes are those inside the overlay.",
        _ASK,
        takes_daemon_flags=True,
    ),
    Subcommand(
        "leases",
        _LOOK,
        "",
        "all leases of the network",
        "As the daemon knows them or, where none runs, as etcd has them (--etcd-endpoints, "
        "--etcd-prefix).",
        _ASK,
        takes_daemon_flags=True,
    ),
    Subcommand(
        "trace",
        _LOOK,
        "ADDRESS",
        "by which routes a packet would go, and if not into the overlay, why",
        "Exit code 1 if it would not be sent into the overlay.",
        _ASK,
        takes_daemon_flags=True,
    ),
    Subcommand(
        "doctor",
        _LOOK,
        "",
        "what keeps this host from being a node, or a good one",
        "Looks at device file, capabilities, UDP port, leftover kernel devices, firewall, kernel "
        "settings, etcd, configuration, clock, leases, the way to each peer and its VTEP, and a "
        "daemon that runs; before it has ever started, too. Exit code 0: nothing found, "
        "1: warnings, 2: a failure.",
        _ASK,
        takes_daemon_flags=True,
    ),
    Subcommand(
        "reload",
        _OPERATE,
        "",
        "replace the running daemon without losing a packet",
        "The daemon starts a successor with its own arguments, of the version that is installed "
        "now, and hands all over to it. Returns when the successor is ready; if it fails, the old "
        "process goes on.",
        (_VNI,),
        takes_daemon_flags=True,
    ),
    Subcommand(
        "docker-opts",
        _OPERATE,
        "",
        "write the Docker daemon's options for this host's subnet",
        "Does what flannel's mk-docker-opts.sh does, with the same options.",
        (
            OwnFlag("-f", "FILE", "subnet file to read (default /run/flannel/subnet.env)"),
            OwnFlag("-d", "FILE", "environment file to write (default /run/docker_opts.env)"),
            OwnFlag("-i", "", "each option as a variable: DOCKER_OPT_BIP, _IPMASQ, _MTU"),
            OwnFlag("-c", "", "all options as one variable; without -i and -c both are written"),
            OwnFlag("-k", "NAME", "name of that one variable (default DOCKER_OPTS)"),
            OwnFlag("-m", "", "leave --ip-masq out"),
        ),
    ),
    Subcommand(
        "man",
        _INSTALL,
        "",
        "print the manual page",
        "To read it: pyflannel-udp man | man -l -",
    ),
    Subcommand(
        "completion",
        _INSTALL,
        "bash|zsh|fish",
        "print the completion script of a shell",
        "To try it: source <(pyflannel-udp completion bash), the same with zsh, or in fish: "
        "pyflannel-udp completion fish | source",
    ),
)

DAEMON_FLAGS = tuple(OwnFlag(f"--{flag.name}", flag.kind.shown, flag.explained) for flag in FLAGS)
"""The daemon's flags as the completions tell them."""

_BY_NAME = {command.name: command for command in SUBCOMMANDS}


def flag_left(flag: Flag) -> str:
    """Return how a flag is written, with the name of its value."""
    return f"--{flag.name} {flag.kind.shown}".rstrip()


def help_text() -> str:
    """Return the text of `--help`: commands and flags, grouped by task."""
    lines = [
        "Usage: pyflannel-udp [FLAGS]            run the node",
        "       pyflannel-udp COMMAND [FLAGS]",
        "",
        ABOUT,
        VARIABLES,
    ]
    for group in dict.fromkeys(command.group for command in SUBCOMMANDS):
        lines += ["", f"{group}, COMMAND is one of:"]
        for command in SUBCOMMANDS:
            if command.group == group:
                lines += _entry(command.synopsis, command.summary)
    for group in dict.fromkeys(flag.group for flag in FLAGS):
        lines += ["", f"{group}:"]
        for flag in FLAGS:
            if flag.group == group:
                lines += _entry(flag_left(flag), flag.explained)
    lines += ["", EXIT_CODES, "Each command has --help; `pyflannel-udp man | man -l -` tells more."]
    return "\n".join(lines)


def command_help(name: str) -> str:
    """Return the text of a sub-command's `--help`."""
    command = _BY_NAME[name]
    lines = [
        f"Usage: pyflannel-udp {command.synopsis}{' [FLAGS]' if command.flags else ''}",
        "",
        f"{command.summary[0].upper()}{command.summary[1:]}.",
        *textwrap.wrap(command.details, WIDTH),
    ]
    if command.flags:
        lines.append("")
    for flag in command.flags:
        lines += _entry(flag.left, flag.help)
    if command.takes_daemon_flags:
        lines += ["", "and the daemon's flags, such as --control-dir; see pyflannel-udp --help"]
    return "\n".join(lines)


def word_count(name: str) -> int:
    """Return how many words that are no flags a sub-command takes."""
    return 1 if _BY_NAME[name].arguments else 0


def synopsis(name: str) -> str:
    """Return a sub-command's name and arguments."""
    return _BY_NAME[name].synopsis


def own_flags(name: str) -> frozenset[str]:
    """Return the flags that a sub-command has beside the daemon's."""
    return frozenset(flag.spelled for flag in _BY_NAME[name].flags)


def _entry(left: str, text: str) -> Iterator[str]:
    """Yield the lines of one command or flag: what is typed, then what it is."""
    head = f"  {left}"
    if len(head) >= TEXT_COLUMN:
        yield head
        head = ""
    indent = " " * TEXT_COLUMN
    yield from textwrap.wrap(
        text,
        WIDTH,
        initial_indent=head.ljust(TEXT_COLUMN),
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
