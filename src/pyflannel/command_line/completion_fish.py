"""The completion script of fish, from the tables of flags and commands. Does no I/O."""

from __future__ import annotations

from collections.abc import Iterator

from pyflannel.command_line.usage import DAEMON_FLAGS, SUBCOMMANDS, OwnFlag

_FIRST = "test (count (commandline -opc)) -eq 1"


def script() -> str:
    """Return the script."""
    takers = " ".join(x.name for x in SUBCOMMANDS if not x.takes_daemon_flags)
    lines = ["complete -c pyflannel-udp -f"]
    for command in SUBCOMMANDS:
        seen = f"__fish_seen_subcommand_from {command.name}"
        lines.append(_line(_FIRST, "-a", command.name, "-d", command.summary))
        if command.choices:
            lines.append(_line(seen, "-a", " ".join(command.choices)))
        lines += (_line(seen, *_flag(flag)) for flag in command.flags)
    daemons = f"not __fish_seen_subcommand_from {takers}"
    lines += (_line(daemons, *_flag(flag)) for flag in DAEMON_FLAGS)
    lines.append("complete -c pyflannel-udp -l help -d 'print the help'")
    return "\n".join(lines)


def _line(condition: str, *words: str) -> str:
    return " ".join(["complete -c pyflannel-udp", *map(_quote, ("-n", condition, *words))])


def _flag(flag: OwnFlag) -> Iterator[str]:
    """Yield the words of `complete` for a flag."""
    name = flag.spelled.lstrip("-")
    yield from ("-l" if flag.spelled.startswith("--") else "-s", name, "-d", flag.help)
    if flag.choices:
        yield from ("-x", "-a", " ".join(flag.choices))
    elif flag.value:
        yield from {
            "FILE": ("-r", "-F"),
            "DIR": ("-x", "-a", "(__fish_complete_directories)"),
            "IFACE": ("-x", "-a", "(ls /sys/class/net)"),
        }.get(flag.value, ("-x",))


def _quote(word: str) -> str:
    """Return a word as fish reads it; within its quotes two characters are special."""
    if word.replace("-", "").isalnum():
        return word
    return "'" + word.replace("\\", r"\\").replace("'", r"\'") + "'"
