"""`pyflannel-udp man`: the manual page, in roff, from the tables of flags and commands."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version

from pyflannel.command_line.arguments import parse_words
from pyflannel.command_line.flags import FLAGS
from pyflannel.command_line.usage import ABOUT, SUBCOMMANDS, VARIABLES, flag_left

_DESCRIPTION = (
    ABOUT,
    "It moves packets between a TUN device flannel.<VNI> and UDP port 8472, and learns from etcd "
    "where to send them. Wire format, keys in etcd, routes, subnet.env, flags and variables are "
    "those of flanneld, so nodes of both kinds may be mixed.",
    "Without a command it runs in the foreground until a signal. At its end the device, the "
    "routes, the traffic rules, the lease and subnet.env stay, as flanneld leaves them.",
)

_FILES = (
    ("/run/flannel/subnet.env", "The host's subnet and MTU, for Docker and CNI (--subnet-file)."),
    ("/run/flannel/pyflannel-<VNI>.sock", "Answers the commands, root only (--control-dir)."),
    ("/var/lib/pyflannel-udp/flannel.<VNI>.json", "The VTEP MAC of this machine (--state-dir)."),
    ("/etc/default/pyflannel-udp", "FLANNELD_* variables of the systemd unit."),
)

_SIGNALS = (
    ("SIGTERM, SIGINT", "End, with exit code 0."),
    (
        "SIGHUP",
        "Read --options-file (verbosity), the certificates and the network configuration again; "
        "the log says what changed and needs a restart.",
    ),
)

_EXIT = (
    ("0", "Ended by a signal; help or version."),
    ("1", "The host, etcd or the configuration refuses; one sentence says what and the remedy."),
    ("2", "The command line cannot be read. doctor: a failure was found."),
)


def main(argv: Sequence[str]) -> int:
    """Print the page."""
    parse_words(argv, "man")
    print("\n".join(page()))
    return 0


def page() -> Iterator[str]:
    """Yield the lines of the page, for man(7)."""
    yield f'.TH PYFLANNEL-UDP 8 "" "pyflannel-udp {version("pyflannel-udp")}"'
    yield from (".SH NAME", r"pyflannel-udp \- flannel node without a kernel vxlan device")
    yield from (".SH SYNOPSIS", r"\fBpyflannel-udp\fR [\fIFLAGS\fR]", ".br")
    yield r"\fBpyflannel-udp\fR \fICOMMAND\fR [\fIFLAGS\fR]"
    yield ".SH DESCRIPTION"
    yield from _paragraphs(_DESCRIPTION)
    yield ".SH COMMANDS"
    for command in SUBCOMMANDS:
        yield from (".TP", rf"\fB{_text(command.synopsis)}\fR")
        yield f"{_text(command.summary[0].upper())}{_text(command.summary[1:])}."
        yield _text(command.details)
        if command.takes_daemon_flags:
            yield "Takes the flags of the daemon too."
        if command.flags:
            yield ".RS"
            yield from _entries((flag.left, flag.help) for flag in command.flags)
            yield ".RE"
    yield from (".SH FLAGS", _text(" ".join(VARIABLES.split())))
    for group in dict.fromkeys(flag.group for flag in FLAGS):
        yield f".SS {group}"
        yield from _entries((flag_left(x), x.explained) for x in FLAGS if x.group == group)
    yield ".SH ENVIRONMENT"
    yield from _entries(
        (
            (
                "FLANNELD_*",
                "Flags that are not given; one that cannot be read is told and ignored.",
            ),
            ("NOTIFY_SOCKET", "READY, RELOADING, STOPPING, status and watchdog, for systemd."),
        )
    )
    for title, pairs in (("FILES", _FILES), ("SIGNALS", _SIGNALS), ("EXIT STATUS", _EXIT)):
        yield f".SH {title}"
        yield from _entries(pairs)
    yield from (".SH SEE ALSO", r"\fBetcdctl\fR(1), \fBip-route\fR(8), \fBsystemd.service\fR(5)")


def _entries(pairs: Iterable[tuple[str, str]]) -> Iterator[str]:
    for left, text in pairs:
        name, _, value = left.partition(" ")
        shown = rf" \fI{_text(value)}\fR" if value else ""
        yield from (".TP", rf"\fB{_text(name)}\fR{shown}", _text(text))


def _paragraphs(texts: Sequence[str]) -> Iterator[str]:
    for number, text in enumerate(texts):
        if number:
            yield ".PP"
        yield _text(text)


def _text(text: str) -> str:
    """Return text that roff prints as it is; a line must not begin with a dot or an apostrophe."""
    escaped = text.replace("\\", r"\e").replace("-", r"\-").replace("`", r"\(ga")
    return rf"\&{escaped}" if escaped[:1] in (".", "'") else escaped
