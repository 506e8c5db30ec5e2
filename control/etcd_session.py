"""What we know about our standing with etcd: one state machine, its words, its back-off.

Does no I/O; the clock and the randomness are parameters. Everybody who asks etcd something reports
the outcome here, so there is one truth for the log, for health and for metrics, and one back-off
for all: an outage costs one attempt at a time, whoever makes it.

            ANSWERED         FAILED            REFUSED
 STARTING   WELL, told       LOST, told        REFUSED, told
 WELL       WELL             LOST, told        REFUSED, told
 LOST       WELL, told       LOST, reminded    REFUSED, told
 REFUSED    WELL, told       REFUSED           REFUSED, reminded

REFUSED means that time alone mends nothing: a certificate, a password or a permission is wrong. An
endpoint that is merely down meanwhile (FAILED) does not change that.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

log = logging.getLogger(__name__)

BACK_OFF_SECONDS = 0.1
BACK_OFF_MAX_SECONDS = 1.0
REFUSED_SECONDS = 30.0
REMIND_SECONDS = {"lost": 60.0, "refused": 600.0}


class SessionState(Enum):
    """How we stand with etcd."""

    STARTING = "starting"
    WELL = "well"
    LOST = "lost"
    REFUSED = "refused"


class Outcome(Enum):
    """How a request ended, after every endpoint was tried."""

    ANSWERED = "answered"
    FAILED = "failed"
    REFUSED = "refused"


class Say(Enum):
    """What the log hears of a transition."""

    NOTHING = "nothing"
    TELL = "tell"
    REMIND = "remind"


_S, _O = SessionState, Outcome
TRANSITIONS: dict[tuple[SessionState, Outcome], tuple[SessionState, Say]] = {
    (_S.STARTING, _O.ANSWERED): (_S.WELL, Say.TELL),
    (_S.STARTING, _O.FAILED): (_S.LOST, Say.TELL),
    (_S.STARTING, _O.REFUSED): (_S.REFUSED, Say.TELL),
    (_S.WELL, _O.ANSWERED): (_S.WELL, Say.NOTHING),
    (_S.WELL, _O.FAILED): (_S.LOST, Say.TELL),
    (_S.WELL, _O.REFUSED): (_S.REFUSED, Say.TELL),
    (_S.LOST, _O.ANSWERED): (_S.WELL, Say.TELL),
    (_S.LOST, _O.FAILED): (_S.LOST, Say.REMIND),
    (_S.LOST, _O.REFUSED): (_S.REFUSED, Say.TELL),
    (_S.REFUSED, _O.ANSWERED): (_S.WELL, Say.TELL),
    (_S.REFUSED, _O.FAILED): (_S.REFUSED, Say.NOTHING),
    (_S.REFUSED, _O.REFUSED): (_S.REFUSED, Say.REMIND),
}


@dataclass(frozen=True, slots=True)
class EtcdSession:
    """A reading of the session for health and metrics; ages are in seconds.

    `silence_seconds` counts from the last answer, None before the first. `failures` counts rounds
    over all endpoints that nobody answered, `moves` the changes of endpoint.
    """

    state: SessionState
    endpoint: str
    cluster_id: int
    revision: int
    silence_seconds: float | None
    last_error: str
    last_error_seconds: float | None
    failures: int
    moves: int

    @property
    def is_well(self) -> bool:
        """Whether the last request was answered."""
        return self.state is SessionState.WELL

    def __str__(self) -> str:
        text = f"etcd {self.state.value}, endpoint {self.endpoint}"
        if self.silence_seconds is not None:
            text += f", last answer {self.silence_seconds:.0f} s ago"
        if self.last_error and not self.is_well:
            text += f": {self.last_error}"
        return text


class Session:
    """The state machine with its memory."""

    def __init__(self, endpoint: str, clock: Callable[[], float], rng: Callable[[], float]) -> None:
        self._clock = clock
        self._rng = rng
        self._state = SessionState.STARTING
        self._endpoint = endpoint
        self._cluster_id = 0
        self._revision = 0
        self._answered_at: float | None = None
        self._error = ""
        self._error_at: float | None = None
        self._failures = 0
        self._failures_in_a_row = 0
        self._moves = 0
        self._told_at = 0.0
        self.retry_at = 0.0
        """Before this time nobody shall ask."""

    @property
    def is_refused(self) -> bool:
        """Whether only a change of certificates or passwords can help."""
        return self._state is SessionState.REFUSED

    def reading(self) -> EtcdSession:
        """Return what health and metrics show."""
        now = self._clock()
        return EtcdSession(
            state=self._state,
            endpoint=self._endpoint,
            cluster_id=self._cluster_id,
            revision=self._revision,
            silence_seconds=None if self._answered_at is None else now - self._answered_at,
            last_error=self._error,
            last_error_seconds=None if self._error_at is None else now - self._error_at,
            failures=self._failures,
            moves=self._moves,
        )

    def answered(self, cluster_id: int, revision: int) -> None:
        """Take in an answer's header."""
        self._answered_at = self._clock()
        self._cluster_id, self._revision = cluster_id, revision
        self._failures_in_a_row = 0
        self.retry_at = 0.0
        self._move(Outcome.ANSWERED, "")

    def endpoint_failed(self, why: str, following: str) -> None:
        """Take in that an endpoint is left for the one that follows it."""
        self._note(why)
        if following != self._endpoint:
            self._moves += 1
            if self._state is SessionState.WELL:
                log.info("leaving an etcd endpoint for %s: %s", following, why)
        self._endpoint = following

    def rejected(self, why: str) -> None:
        """Take in that etcd answered a request with no, which is up to that request."""
        self._note(why)

    def failed(self, why: str) -> None:
        """Take in that no endpoint answered."""
        self._count(why)
        if not self.is_refused:
            delay = min(
                BACK_OFF_SECONDS * 2 ** min(self._failures_in_a_row - 1, 10), BACK_OFF_MAX_SECONDS
            )
            self.retry_at = self._clock() + delay * (0.5 + self._rng() / 2)
        self._move(Outcome.FAILED, why)

    def refused(self, why: str) -> None:
        """Take in that etcd, or TLS, wants other credentials."""
        self._count(why)
        self.retry_at = self._clock() + REFUSED_SECONDS
        self._move(Outcome.REFUSED, why)

    def _count(self, why: str) -> None:
        self._failures += 1
        self._failures_in_a_row += 1
        self._note(why)

    def _note(self, why: str) -> None:
        self._error, self._error_at = why, self._clock()

    def _move(self, outcome: Outcome, why: str) -> None:
        self._state, say = TRANSITIONS[self._state, outcome]
        now = self._clock()
        if say is Say.NOTHING:
            return
        if say is Say.REMIND and now - self._told_at < REMIND_SECONDS[self._state.value]:
            return
        self._told_at = now
        if outcome is Outcome.ANSWERED:
            log.info("etcd answers at %s, revision %d", self._endpoint, self._revision)
        elif outcome is Outcome.REFUSED:
            log.error("etcd refuses us: %s", why)
        elif self._answered_at is None:
            log.warning("etcd does not answer, trying again: %s", why)
        else:
            log.warning("etcd does not answer, forwarding goes on as it is: %s", why)
