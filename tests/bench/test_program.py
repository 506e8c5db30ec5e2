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
import time
from bench.program import begin, run_program, say

def main():
    begin()
    try:
        say("begun")
        time.sleep(60)
    finally:
        say("removing")
        time.sleep(0.5)
        say("removed")
    return 0

run_program(main)
"""


def test_it_takes_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(SystemExit, match="run it as root"):
        begin()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_removes_what_was_made(number: signal.Signals, code: int) -> None:
    require_root()
    command = [sys.executable, "-c", SLEEPS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "begun\n"
        process.send_signal(number)
        assert "removed" in process.stdout.read()
    assert process.returncode == code


def test_a_second_sigterm_leaves_nothing_behind() -> None:
    require_root()
    command = [sys.executable, "-c", SLEEPS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "begun\n"
        process.terminate()
        assert process.stdout.readline() == "removing\n"
        process.terminate()
        assert process.stdout.readline() == "removed\n"
    assert process.returncode == 143
