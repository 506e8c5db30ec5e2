"""What `doctor` has to say: one sentence, its remedy, and how bad it is."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


class Severity(IntEnum):
    """How bad a finding is; the worst is the exit code, as monitoring plugins have it."""

    WARNING = 1
    """The node works, or will, but not in all respects."""
    FAILURE = 2
    """The node does not work, or will not start."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is amiss."""

    severity: Severity
    sentence: str
    remedy: str


def warning(sentence: str, remedy: str) -> Finding:
    """Return a finding that is a warning."""
    return Finding(Severity.WARNING, sentence, remedy)


def failure(sentence: str, remedy: str) -> Finding:
    """Return a finding that keeps the node from working."""
    return Finding(Severity.FAILURE, sentence, remedy)
