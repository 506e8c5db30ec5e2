"""The command line of the sub-commands that look at a node: the daemon's flags and a few more.

They take the same flags and variables as the daemon, so that what is in a unit file or an
environment file can be given to them as it is.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from pyflannel.options import HelpRequested, Options, UsageError, parse_options, takes_next_word

USAGE_END = """
  --json      print JSON instead of a table
  --vni N     choose one of several daemons on this host
and the daemon's flags, such as --control-dir; see pyflannel-udp --help"""


@dataclass(frozen=True, slots=True)
class Command:
    """What was asked for: the daemon's options, the words that are no flags, our own flags."""

    options: Options
    words: tuple[str, ...]
    json: bool
    vni: int | None


def parse_command(argv: Sequence[str], usage: str, words: int = 0) -> Command:
    """Read a sub-command's words, of which `words` are no flags.

    Raises UsageError, HelpRequested or Refusal.
    """
    ours: list[str] = []
    flags: list[str] = []
    as_json, vni = False, None
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.removeprefix("-").removeprefix("-").partition("=")
        if not word.startswith("-"):
            ours.append(word)
        elif name in ("help", "h"):
            raise HelpRequested(f"Usage: pyflannel-udp {usage}\n{USAGE_END}")
        elif name == "json" and not equals:
            as_json = True
        elif name == "vni":
            text = value if equals or not rest else rest.pop(0)
            if not text.isdecimal():
                raise UsageError(f"--vni {text!r}: must be a whole number")
            vni = int(text)
        else:
            flags.append(word)
            if takes_next_word(word) and rest:
                flags.append(rest.pop(0))
    if len(ours) != words:
        raise UsageError(f"usage: pyflannel-udp {usage.splitlines()[0]}")
    return Command(parse_options(flags, os.environ), tuple(ours), as_json, vni)
