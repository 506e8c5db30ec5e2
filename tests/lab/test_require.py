"""A test that cannot run says what it lacks: skipped at home, a failure with CI=true."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from tests.lab.require import require_program, require_root

LACKS: tuple[tuple[Callable[[], None], str], ...] = (
    (lambda: require_program("pfu-no-such-program"), "needs the program pfu-no-such-program"),
    (require_root, "needs root"),
)


@pytest.fixture(autouse=True)
def nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 65534)


@pytest.mark.parametrize(("need", "sentence"), LACKS)
def test_with_ci_it_fails(
    monkeypatch: pytest.MonkeyPatch, need: Callable[[], None], sentence: str
) -> None:
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match=sentence):
        need()


@pytest.mark.parametrize("ci", ["", "false", None])
@pytest.mark.parametrize(("need", "sentence"), LACKS)
def test_at_home_it_is_skipped(
    monkeypatch: pytest.MonkeyPatch, need: Callable[[], None], sentence: str, ci: str | None
) -> None:
    if ci is None:
        monkeypatch.delenv("CI", raising=False)
    else:
        monkeypatch.setenv("CI", ci)
    with pytest.raises(pytest.skip.Exception, match=sentence):
        need()


def test_what_is_there_is_neither(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    require_root()
    require_program("sh")
