"""A wiped or rolled-back etcd is told from one that went on."""

from __future__ import annotations

import pytest

from pyflannel.control.history import History
from pyflannel.control.lease import KeyValue


def kv(key: str, created: int, modified: int) -> KeyValue:
    return KeyValue(key.encode(), b"", created, modified, 1, 0)


@pytest.fixture
def known() -> History:
    history = History()
    assert history.reset(7, 100, [kv("a", 10, 50), kv("b", 20, 90)]) == ""
    return history


def test_a_store_that_went_on_is_the_same(known: History) -> None:
    known.put(kv("c", 101, 101))
    known.deleted(b"b")
    known.advance(103)
    assert known.reset(7, 120, [kv("a", 10, 110), kv("c", 101, 101), kv("d", 104, 104)]) == ""


def test_silence_is_the_same(known: History) -> None:
    assert known.reset(7, 100, [kv("a", 10, 50), kv("b", 20, 90)]) == ""
    assert known.reset(7, 100, [kv("a", 10, 50)]) == ""


@pytest.mark.parametrize(
    ("cluster", "revision", "kvs", "named"),
    [
        (8, 200, [], "another cluster"),
        (7, 99, [], "went back"),
        (7, 1, [], "went back"),
        (7, 150, [kv("a", 2, 2)], "a is older"),
        (7, 150, [kv("a", 2, 120)], "a is older"),
        (7, 150, [kv("a", 10, 60)], "a is older"),
        (7, 150, [kv("a", 10, 50), kv("z", 30, 130)], "z is older"),
    ],
)
def test_another_history(
    known: History, cluster: int, revision: int, kvs: list[KeyValue], named: str
) -> None:
    assert named in known.reset(cluster, revision, kvs)
    assert known.reset(cluster, revision, kvs) == ""
