"""The session with etcd: every transition, what is said, and how long to wait."""

from __future__ import annotations

import itertools
import logging
import re

import pytest

from pyflannel.control import etcd_session
from pyflannel.control.etcd_fault import Fault, diagnose
from pyflannel.control.etcd_session import (
    TRANSITIONS,
    Outcome,
    Say,
    Session,
    SessionState,
)


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def made(clock: Clock) -> Session:
    return Session("http://192.0.2.1:2379", clock, lambda: 1.0)


def act(session: Session, outcome: Outcome, why: str = "why") -> None:
    if outcome is Outcome.ANSWERED:
        session.answered(7, 12)
    elif outcome is Outcome.FAILED:
        session.failed(why)
    else:
        session.refused(why)


TO = {
    SessionState.STARTING: (),
    SessionState.WELL: (Outcome.ANSWERED,),
    SessionState.LOST: (Outcome.FAILED,),
    SessionState.REFUSED: (Outcome.REFUSED,),
}
WORDS = {"told": Say.TELL, "reminded": Say.REMIND, "": Say.NOTHING}


def test_the_drawing_is_the_table() -> None:
    rows = re.findall(r"^ ([A-Z]+)  +(.*)$", etcd_session.__doc__ or "", re.MULTILINE)
    drawn = {}
    for name, cells in rows[1:] if rows[0][0] == "ANSWERED" else rows:
        for outcome, cell in zip(Outcome, re.split(r"  +", cells)):
            state, _, word = cell.partition(", ")
            drawn[SessionState[name], outcome] = (SessionState[state], WORDS[word])
    assert drawn == TRANSITIONS
    assert set(TRANSITIONS) == set(itertools.product(SessionState, Outcome))


@pytest.mark.parametrize(("state", "outcome"), list(itertools.product(SessionState, Outcome)))
def test_every_transition(
    state: SessionState, outcome: Outcome, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    clock = Clock()
    session = made(clock)
    for step in TO[state]:
        act(session, step)
    assert session.reading().state is state
    caplog.clear()
    act(session, outcome)
    following, say = TRANSITIONS[state, outcome]
    assert session.reading().state is following
    assert len(caplog.records) == (1 if say is Say.TELL else 0)
    clock.now += 601
    caplog.clear()
    act(session, outcome)
    again = TRANSITIONS[following, outcome][1]
    assert len(caplog.records) == (0 if again is Say.NOTHING else 1)


def test_back_off_grows_to_a_second_and_ends_with_an_answer() -> None:
    clock = Clock()
    session = made(clock)
    delays = []
    for _ in range(6):
        session.failed("why")
        delays.append(round(session.retry_at - clock.now, 3))
    assert delays == [0.1, 0.2, 0.4, 0.8, 1.0, 1.0]
    session.answered(7, 12)
    assert session.retry_at <= clock.now


def test_a_refusal_waits_long_even_if_other_endpoints_are_down() -> None:
    clock = Clock()
    session = made(clock)
    session.refused("wrong password")
    assert session.retry_at == clock.now + 30
    session.failed("connection refused")
    assert session.is_refused
    assert session.retry_at == clock.now + 30


def test_the_reading_tells_ages_endpoint_and_error() -> None:
    clock = Clock()
    session = made(clock)
    assert session.reading().silence_seconds is None
    session.answered(7, 12)
    clock.now += 3
    session.endpoint_failed("http://192.0.2.1:2379: down", "http://192.0.2.2:2379")
    session.failed("http://192.0.2.2:2379: down")
    clock.now += 2
    reading = session.reading()
    assert (reading.silence_seconds, reading.last_error_seconds) == (5, 2)
    assert (reading.endpoint, reading.moves, reading.failures) == ("http://192.0.2.2:2379", 1, 1)
    assert (reading.cluster_id, reading.revision, reading.is_well) == (7, 12, False)
    assert str(reading) == (
        "etcd lost, endpoint http://192.0.2.2:2379, last answer 5 s ago: "
        "http://192.0.2.2:2379: down"
    )


def test_a_request_that_is_rejected_is_shown_and_changes_nothing() -> None:
    clock = Clock()
    session = made(clock)
    session.answered(7, 12)
    session.rejected("http://192.0.2.1:2379: permission denied")
    clock.now += 2
    reading = session.reading()
    assert reading.is_well
    assert reading.failures == reading.moves == 0
    assert reading.last_error == "http://192.0.2.1:2379: permission denied"
    assert reading.last_error_seconds == 2


@pytest.mark.parametrize(
    ("code", "details", "fault"),
    [
        ("UNAVAILABLE", "failed to connect: Connection refused (111)", Fault.ENDPOINT),
        ("UNAVAILABLE", "etcdserver: no leader", Fault.ENDPOINT),
        ("DEADLINE_EXCEEDED", "Deadline Exceeded", Fault.ENDPOINT),
        ("UNAUTHENTICATED", "etcdserver: invalid auth token", Fault.TOKEN),
        ("INVALID_ARGUMENT", "etcdserver: revision of auth store is old", Fault.TOKEN),
        (
            "INVALID_ARGUMENT",
            "etcdserver: authentication failed, invalid user ID or password",
            Fault.CREDENTIALS,
        ),
        ("UNAVAILABLE", "Ssl handshake failed: CERTIFICATE_VERIFY_FAILED", Fault.CREDENTIALS),
        ("PERMISSION_DENIED", "etcdserver: permission denied", Fault.REQUEST),
        ("NOT_FOUND", "etcdserver: requested lease not found", Fault.REQUEST),
    ],
)
def test_what_an_error_means(code: str, details: str, fault: Fault) -> None:
    assert diagnose(code, details)[0] is fault


@pytest.mark.parametrize(
    ("scheme", "says", "hint"),
    [
        ("http", "Socket closed", "if it speaks TLS, write https://"),
        (
            "https",
            "Handshake read failed (Socket closed)",
            "if it does not speak TLS, write http://",
        ),
        # grpc before 1.81
        ("https", "Socket closed", "if it does not speak TLS, write http://"),
        # grpc 1.73 to 1.78
        ("https", "Secure read failed", "it wants a client certificate"),
    ],
)
def test_words_of_every_grpc_are_understood(scheme: str, says: str, hint: str) -> None:
    last = f"last error: UNAVAILABLE: ipv4:192.0.2.1:2379: {says}"
    details = f"failed to connect to all addresses; {last}"
    assert hint in diagnose("UNAVAILABLE", details, scheme)[1]
