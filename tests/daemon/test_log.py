"""The form of log lines: klog's, which operators grep, and JSON."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterator

import pytest

from pyflannel.management.log import set_up_log

log = logging.getLogger("pyflannel.test")


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[[], str]]:
    """What goes to stderr; the log of the process is put back afterwards."""
    root, ours = logging.getLogger(), logging.getLogger("pyflannel")
    before = root.handlers[:], root.level, ours.level
    yield lambda: capsys.readouterr().err
    root.handlers[:], root.level = before[0], before[1]
    ours.setLevel(before[2])


def test_a_line_has_klogs_header(printed: Callable[[], str]) -> None:
    set_up_log(0, "text")
    log.info("Using %s as external address", "192.0.2.1")
    assert re.fullmatch(
        rf"I\d{{4}} \d\d:\d\d:\d\d\.\d{{6}} {os.getpid():7d} test_log\.py:\d+\] "
        r"Using 192\.0\.2\.1 as external address\n",
        printed(),
    )


def test_the_letter_is_the_severity(printed: Callable[[], str]) -> None:
    set_up_log(2, "text")
    for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR, logging.CRITICAL):
        log.log(level, "x")
    assert [line[0] for line in printed().splitlines()] == list("IIWEF")


@pytest.mark.parametrize(("verbosity", "shown"), [(-1, 0), (0, 0), (1, 0), (2, 1), (10, 1)])
def test_details_are_shown_from_two_on(
    printed: Callable[[], str], verbosity: int, shown: int
) -> None:
    set_up_log(verbosity, "text")
    log.debug("a detail")
    logging.getLogger("asyncio").debug("another's detail")
    assert printed().count("detail") == shown


def test_json_is_one_object_a_line(printed: Callable[[], str]) -> None:
    set_up_log(0, "json")
    log.warning('two\nlines and "quotes"')
    (line,) = printed().splitlines()
    entry = json.loads(line)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", entry.pop("time"))
    assert entry == {
        "level": "warning",
        "logger": "pyflannel.test",
        "message": 'two\nlines and "quotes"',
    }


@pytest.mark.parametrize("form", ["text", "json"])
def test_an_exception_is_told(printed: Callable[[], str], form: str) -> None:
    set_up_log(0, form)
    try:
        raise ValueError("broken")
    except ValueError:
        log.exception("it failed")
    text = printed()
    if form == "json":
        (line,) = text.splitlines()
        text = json.loads(line)["exception"]
    assert "Traceback" in text
    assert "ValueError: broken" in text
