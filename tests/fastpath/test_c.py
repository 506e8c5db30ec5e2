"""Runs the C of the fast path under the sanitizers; `make -C tests/fastpath` does so by hand."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.lab.require import require_program

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parent


def _make(*words: str) -> str:
    done = subprocess.run(
        ["make", "-C", str(FOLDER), *words], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_everything_repeatable_holds() -> None:
    require_program("gcc")
    assert "all holds" in _make("check")


@pytest.mark.skipif(os.uname().machine == "aarch64", reason="the test before has run there")
def test_everything_repeatable_holds_on_aarch64() -> None:
    for program in ("aarch64-linux-gnu-gcc", "qemu-aarch64"):
        require_program(program)
    assert "all holds" in _make("check-aarch64")


def test_the_corpus_and_a_few_seconds_of_fuzzing_hold() -> None:
    require_program("clang")
    printed = _make("fuzz", "SECONDS=3")
    for target in ("decap", "segment", "coalesce"):
        assert re.search(rf"^{target}: [1-9]\d* inputs hold$", printed, re.MULTILINE)
