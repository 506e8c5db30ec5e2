"""How the programs begin and end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from bench.program import begin
from tests.lab.require import require_root

SLEEPS = """
import sys
import time
from bench.program import begin, run_program, say

def main():
    begin()
    try:
        say("begun")
        time.sleep(60)
    finally:
        say("removing")
        sys.stdin.readline()
        say("removed")
    return 0

run_program(main)
"""


def sleeper() -> subprocess.Popen[str]:
    """A program that has begun, and does not end its removal before stdin says so."""
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", SLEEPS], stdin=pipe, stdout=pipe, text=True)
    assert process.stdout
    assert process.stdout.readline() == "begun\n"
    return process


def test_it_takes_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(SystemExit, match="run it as root"):
        begin()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_removes_what_was_made(number: signal.Signals, code: int) -> None:
    require_root()
    with sleeper() as process:
        process.send_signal(number)
        assert "removed" in process.communicate()[0]
    assert process.returncode == code


def test_a_second_sigterm_leaves_nothing_behind() -> None:
    require_root()
    with sleeper() as process:
        assert process.stdout
        process.terminate()
        assert process.stdout.readline() == "removing\n"
        process.terminate()
        assert process.communicate("go on\n")[0] == "removed\n"
    assert process.returncode == 143
