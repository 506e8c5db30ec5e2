"""`pyflannel-udp completion`: the completion script of bash, from the tables of flags and commands.

Not argparse's completers (shtab, argcomplete), as the command line is Go's and not argparse's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pyflannel.command_line import parse_words
from pyflannel.flags import FLAGS
from pyflannel.options import UsageError
from pyflannel.usage import SUBCOMMANDS, Subcommand

_BASH = """\
_pyflannel_udp() {{
	local current=${{COMP_WORDS[COMP_CWORD]}} previous=${{COMP_WORDS[COMP_CWORD - 1]}} words=
	# bash makes three words of --flag=value
	if [[ $current == = ]]; then
		current=
	elif [[ $previous == = ]]; then
		previous=${{COMP_WORDS[COMP_CWORD - 2]}}
	fi
	case ${{COMP_WORDS[1]}}:$previous in
{values}
	*)
		case $COMP_CWORD:${{COMP_WORDS[1]}} in
		1:*) words='{first}' ;;
{commands}
		*) words='{flags}' ;;
		esac
		;;
	esac
	COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -F _pyflannel_udp pyflannel-udp"""


def main(argv: Sequence[str]) -> int:
    """Print the script of the shell that is named."""
    (shell,) = parse_words(argv, "completion")
    if shell != "bash":
        raise UsageError(f"there is none for {shell}, only for bash")
    print(bash())
    return 0


def _valued() -> Iterator[tuple[str, str]]:
    """Yield each flag that has a value, behind the command it belongs to, and the value's name."""
    for flag in FLAGS:
        if not flag.is_boolean:
            yield f"*:--{flag.name}", flag.kind.shown
    for command in SUBCOMMANDS:
        for own in command.flags:
            if own.value:
                yield f"{command.name}:{own.spelled}", own.value


def _words(command: Subcommand) -> str:
    daemons = [f"--{flag.name}" for flag in FLAGS] if command.takes_daemon_flags else []
    choices = command.arguments.split("|") if command.arguments.islower() else []
    return " ".join([*choices, "--help", *(own.spelled for own in command.flags), *daemons])


def _way(value: str) -> str:
    """Return the commands of bash that propose a value."""
    if "|" in value:
        return f"words='{value.replace('|', ' ')}'"
    return {
        "FILE": "compopt -o default; return",
        "DIR": "compopt -o dirnames; return",
        "IFACE": "words=$(ls /sys/class/net)",
    }.get(value, "return")


def bash() -> str:
    """Return the script for bash."""
    patterns: dict[str, list[str]] = {}
    for pattern, value in _valued():
        patterns.setdefault(_way(value), []).append(pattern)
    flags = " ".join(f"--{flag.name}" for flag in FLAGS)
    return _BASH.format(
        values="\n".join(f"\t{' | '.join(x)}) {way} ;;" for way, x in patterns.items()),
        first=" ".join([*(command.name for command in SUBCOMMANDS), "--help", flags]),
        commands="\n".join(f"\t\t*:{x.name}) words='{_words(x)}' ;;" for x in SUBCOMMANDS),
        flags=f"--help {flags}",
    )
