"""The command line of the sub-commands.

Those that look at a node take the same flags and variables as the daemon, so that what is in a unit
file or an environment file can be given to them as it is.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from pyflannel.command_line.options import (
    HelpRequested,
    Options,
    UsageError,
    parse_options,
    takes_next_word,
)
from pyflannel.command_line.usage import command_help, own_flags, synopsis, word_count


@dataclass(frozen=True, slots=True)
class Command:
    """What was asked for: the daemon's options, the words that are no flags, our own flags."""

    options: Options
    words: tuple[str, ...]
    json: bool
    vni: int | None


def parse_command(argv: Sequence[str], name: str) -> Command:
    """Read the words behind the name of a sub-command that takes the daemon's flags.

    Raises UsageError, HelpRequested or Refusal.
    """
    ours: list[str] = []
    flags: list[str] = []
    as_json, vni = False, None
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        flag, equals, value = word.removeprefix("-").removeprefix("-").partition("=")
        if not word.startswith("-"):
            ours.append(word)
        elif flag in ("help", "h"):
            raise HelpRequested(command_help(name))
        elif flag == "json" and not equals and "--json" in own_flags(name):
            as_json = True
        elif flag == "vni":
            text = value if equals or not rest else rest.pop(0)
            if not text.isdecimal():
                raise UsageError(f"--vni {text!r}: must be a whole number")
            vni = int(text)
        else:
            flags.append(word)
            if takes_next_word(word) and rest:
                flags.append(rest.pop(0))
    if len(ours) != word_count(name):
        raise UsageError(f"usage: pyflannel-udp {synopsis(name)}; see {name} --help")
    return Command(parse_options(flags, os.environ), tuple(ours), as_json, vni)


def parse_words(argv: Sequence[str], name: str) -> Sequence[str]:
    """Return the words behind a sub-command that takes no flags; UsageError, HelpRequested."""
    if {*argv} & {"-h", "-help", "--help"}:
        raise HelpRequested(command_help(name))
    if len(argv) != word_count(name):
        raise UsageError(f"usage: pyflannel-udp {synopsis(name)}; see {name} --help")
    return argv
