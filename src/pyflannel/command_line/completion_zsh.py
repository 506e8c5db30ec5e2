"""The completion script of zsh, from the tables of flags and commands. Does no I/O."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable

from pyflannel.command_line.usage import DAEMON_FLAGS, SUBCOMMANDS, OwnFlag

_SCRIPT = """\
#compdef pyflannel-udp
_pyflannel-udp() {{
	local -a commands=({commands}) daemon=({daemon})
	if ((CURRENT == 2)) && [[ $PREFIX != -* ]]; then
		_describe command commands
		return
	fi
	case $words[2] in
{cases}
	*) _arguments $daemon ;;
	esac
}}
# As a file of $fpath it is the function's body at the first call.
if [[ $funcstack[1] == _pyflannel-udp ]]; then
	_pyflannel-udp "$@"
else
	compdef _pyflannel-udp pyflannel-udp
fi"""


def script() -> str:
    """Return the script."""
    cases = []
    for command in SUBCOMMANDS:
        words = [
            "1: : ",
            *([f"2:{command.arguments}:{_way(command.choices, '')}"] if command.arguments else []),
        ]
        specs = _quoted([*words, *map(_flag, command.flags)])
        daemon = "$daemon" if command.takes_daemon_flags else "'--help[print the help]'"
        cases.append(f"\t{command.name}) _arguments {specs} {daemon} ;;")
    return _SCRIPT.format(
        commands=_quoted(f"{x.name}:{x.summary}" for x in SUBCOMMANDS),
        daemon=_quoted(["--help[print the help]", *map(_flag, DAEMON_FLAGS)]),
        cases="\n".join(cases),
    )


def _quoted(words: Iterable[str]) -> str:
    return " ".join(map(shlex.quote, words))


def _flag(flag: OwnFlag) -> str:
    """Return the specification of a flag for `_arguments`; any flag may be given again."""
    takes = "=" if flag.value and flag.spelled.startswith("--") else ""
    explained = re.sub(r"([\[\]:\\])", r"\\\1", flag.help)
    value = (
        f":{flag.value.replace(':', ' ')}:{_way(flag.choices, flag.value)}" if flag.value else ""
    )
    return f"*{flag.spelled}{takes}[{explained}]{value}"


def _way(choices: Iterable[str], value: str) -> str:
    """Return what proposes a value."""
    if choices:
        return f"({' '.join(choices)})"
    return {"FILE": "_files", "DIR": "_files -/", "IFACE": "_net_interfaces"}.get(value, " ")
