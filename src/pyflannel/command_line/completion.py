"""`pyflannel-udp completion`: the script of a shell, from the tables of flags and commands.

That of bash is here.

Not argparse's completers (shtab, argcomplete), as the command line is Go's and not argparse's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pyflannel.command_line import completion_fish, completion_zsh
from pyflannel.command_line.arguments import parse_words
from pyflannel.command_line.options import UsageError
from pyflannel.command_line.usage import DAEMON_FLAGS, SUBCOMMANDS, Subcommand

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
    if shell not in _SCRIPTS:
        raise UsageError(f"there is none for {shell}, only for {', '.join(_SCRIPTS)}")
    print(_SCRIPTS[shell]())
    return 0


def _valued() -> Iterator[tuple[str, str]]:
    """Yield each flag that has a value, behind the command it belongs to, and the value's name."""
    for flag in DAEMON_FLAGS:
        if flag.value:
            yield f"*:{flag.spelled}", flag.value
    for command in SUBCOMMANDS:
        for own in command.flags:
            if own.value:
                yield f"{command.name}:{own.spelled}", own.value


def _words(command: Subcommand) -> str:
    daemons = DAEMON_FLAGS if command.takes_daemon_flags else ()
    flags = (flag.spelled for flag in (*command.flags, *daemons))
    return " ".join([*command.choices, "--help", *flags])


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
    flags = " ".join(flag.spelled for flag in DAEMON_FLAGS)
    return _BASH.format(
        values="\n".join(f"\t{' | '.join(x)}) {way} ;;" for way, x in patterns.items()),
        first=" ".join([*(command.name for command in SUBCOMMANDS), "--help", flags]),
        commands="\n".join(f"\t\t*:{x.name}) words='{_words(x)}' ;;" for x in SUBCOMMANDS),
        flags=f"--help {flags}",
    )


_SCRIPTS = {"bash": bash, "zsh": completion_zsh.script, "fish": completion_fish.script}
