"""The manual page and the completion: complete, and understood by mandoc, man and the shells."""

from __future__ import annotations

import os
import pty
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from pyflannel import cli
from pyflannel.command_line.flags import FLAGS
from pyflannel.command_line.usage import SUBCOMMANDS
from tests.lab.require import require_program

COMPLETE = """
set -u
eval "$SCRIPT"
read -ra COMP_WORDS <<<"$1"
[[ $1 != *" " ]] || COMP_WORDS+=("")
COMP_CWORD=$((${#COMP_WORDS[@]} - 1)) COMPREPLY=()
compopt() { printf '%s\\n' "$2"; }
_pyflannel_udp
printf '%s\\n' "${COMPREPLY[@]}"
complete -p pyflannel-udp >&2
"""


def printed(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert cli.main(argv) == 0
    return capsys.readouterr().out


def complete(script: str, typed: str) -> list[str]:
    """Return what bash proposes, or what it is told to propose, for words typed so far."""
    done = subprocess.run(
        ["bash", "--norc", "-c", COMPLETE, "bash", f"pyflannel-udp {typed}"],
        env={"PATH": "/usr/bin:/bin", "SCRIPT": script},
        capture_output=True,
        text=True,
    )
    assert done.stderr == "complete -F _pyflannel_udp pyflannel-udp\n"
    return done.stdout.split()


def test_mandoc_finds_nothing_wrong_with_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    require_program("mandoc")
    page = printed(capsys, "man")
    lint = ["mandoc", "-T", "lint", "-W", "warning"]
    done = subprocess.run(lint, input=page, capture_output=True, text=True)
    # The page has a version and no date of its own.
    complaints = [x for x in done.stdout.splitlines() if "missing date" not in x]
    assert not complaints


def test_the_page_tells_every_flag_and_command(capsys: pytest.CaptureFixture[str]) -> None:
    require_program("mandoc")
    done = subprocess.run(
        ["mandoc", "-T", "ascii", "-O", "width=200"],
        input=printed(capsys, "man"),
        capture_output=True,
        text=True,
        check=True,
    )
    text = " ".join(re.sub(".\b", "", done.stdout).split())
    for flag in FLAGS:
        assert f" --{flag.name} {flag.kind.shown} {flag.explained}".replace("  ", " ") in text
    for command in SUBCOMMANDS:
        assert f" {command.synopsis} {command.summary[0].upper()}{command.summary[1:]}. " in text
        for own in command.flags:
            assert f" {own.left} {own.help}" in text


@pytest.mark.parametrize(
    ("typed", "proposed"),
    [
        ("sta", ["status"]),
        ("--etcd-c", ["--etcd-cafile", "--etcd-certfile"]),
        ("--ip-masq --anti-spoofing ", ["off", "log", "enforce"]),
        ("--sched = r", ["raised", "realtime"]),
        ("--sched =", ["normal", "raised", "realtime"]),
        ("--iface lo", ["lo"]),
        ("--poll-us ", []),
        ("--etcd-cafile ", ["default"]),
        ("--state-dir = ", ["dirnames"]),
        ("status --j", ["--json"]),
        ("status --control-dir ", ["dirnames"]),
        ("docker-opts -", ["--help", "-f", "-d", "-i", "-c", "-k", "-m"]),
        ("docker-opts -d ", ["default"]),
        ("man --", ["--help"]),
        ("completion ", ["bash", "zsh", "fish", "--help"]),
    ],
)
def test_bash_completes(
    capsys: pytest.CaptureFixture[str], typed: str, proposed: list[str]
) -> None:
    assert complete(printed(capsys, "completion", "bash"), typed) == proposed


def test_every_command_and_flag_is_proposed(capsys: pytest.CaptureFixture[str]) -> None:
    proposed = complete(printed(capsys, "completion", "bash"), "")
    flags = [f"--{flag.name}" for flag in FLAGS]
    assert proposed == [*(command.name for command in SUBCOMMANDS), "--help", *flags]


def type_in(tmp_path: Path, *argv: str, typed: str) -> str:
    """Return what a terminal shows whose interactive shell gets this typed."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        environment = {"PATH": "/usr/bin:/bin", "TERM": "dumb", "HOME": str(tmp_path)}
        os.execve(f"/bin/{argv[0]}", argv, environment)
    os.write(terminal, typed.encode())
    shown = b""
    try:
        while part := os.read(terminal, 4096):
            shown += part
    except OSError:  # what a terminal says at its end
        os.waitpid(pid, 0)
    return shown.decode()


@pytest.mark.parametrize(
    ("argv", "prepare"),
    [
        (("bash", "--norc"), "source <(SCRIPT)"),
        (("zsh", "-f"), "autoload -U compinit; compinit -u -D; source <(SCRIPT)"),
        (
            ("zsh", "-f"),
            "SCRIPT >_pyflannel-udp; fpath=($PWD $fpath); autoload -U compinit; compinit -u -D",
        ),
    ],
    ids=["bash", "zsh", "zsh-fpath"],
)
def test_the_tab_key_in_an_interactive_shell(
    tmp_path: Path, argv: tuple[str, ...], prepare: str
) -> None:
    require_program(argv[0])
    (tmp_path / "authority.pem").touch()
    script = f"{sys.executable} -m pyflannel completion {argv[0]}"
    lines = (
        "--etcd-ca\tauth\t",
        "sta\t--js\t",
        "trace 10.5.2.7 --anti-spoofing enf\t",
        "docker-opts -k NAME -f auth\t",
        "completion fi\t",
    )
    # Each line is printed, not run.
    typed = "".join(f"pyflannel-udp {line}\x01echo said \n" for line in lines)
    shown = type_in(tmp_path, *argv, typed=f"{prepare.replace('SCRIPT', script)}\n{typed}exit\n")
    said = [x.split() for x in shown.replace("=", " ").splitlines() if x.startswith("said")]
    assert [" ".join(words[2:]) for words in said] == [
        "--etcd-cafile authority.pem",
        "status --json",
        "trace 10.5.2.7 --anti-spoofing enforce",
        "docker-opts -k NAME -f authority.pem",
        "completion fish",
    ]


def fish(capsys: pytest.CaptureFixture[str], tmp_path: Path, typed: str) -> list[str]:
    """Return what fish proposes for words typed so far."""
    require_program("fish")
    script = printed(capsys, "completion", "fish")
    done = subprocess.run(
        ["fish", "--no-config", "-c", f"{script}\ncomplete -C {shlex.quote(typed)}"],
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert not done.stderr
    return [line.split("\t")[0] for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    ("typed", "proposed"),
    [
        ("sta", ["status"]),
        ("--ip-masq --anti-spoofing ", ["enforce", "log", "off"]),
        ("--sched=r", ["--sched=raised", "--sched=realtime"]),
        ("--iface lo", ["lo"]),
        ("--poll-us ", []),
        ("--etcd-cafile aut", ["authority.pem"]),
        ("status --js", ["--json"]),
        ("docker-opts --iface", []),
        ("completion ", ["bash", "fish", "zsh"]),
    ],
)
def test_fish_completes(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, typed: str, proposed: list[str]
) -> None:
    (tmp_path / "authority.pem").touch()
    assert fish(capsys, tmp_path, f"pyflannel-udp {typed}") == proposed


def test_fish_proposes_every_command_and_flag(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    names = [command.name for command in SUBCOMMANDS]
    assert fish(capsys, tmp_path, "pyflannel-udp ") == sorted(names)
    flags = [f"--{flag.name}" for flag in FLAGS]
    found = fish(capsys, tmp_path, "pyflannel-udp --")
    assert sorted(x.rstrip("=") for x in found) == sorted([*flags, "--help"])


def test_zsh_knows_every_command_and_flag(capsys: pytest.CaptureFixture[str]) -> None:
    script = printed(capsys, "completion", "zsh")
    for command in SUBCOMMANDS:
        assert f"'{command.name}:" in script and f"\t{command.name}) _arguments" in script
    for flag in FLAGS:
        assert re.search(rf"'\*--{flag.name}{'' if flag.is_boolean else '='}\[", script), flag.name


@pytest.mark.parametrize("argv", [["man", "ls"], ["completion"], ["completion", "csh"]])
def test_bad_input_is_one_sentence(capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
    assert cli.main(argv) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
