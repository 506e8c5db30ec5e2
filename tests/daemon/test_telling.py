"""What the operator is told: suspects in the log, counters on the metrics page."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network
from typing import cast

import pytest

from pyflannel.control.lease import KeyValue, parse_lease_untrusted
from pyflannel.dataplane.fastpath import (
    Context,
    Suspect,
)
from pyflannel.dataplane.route import MacAddress
from pyflannel.node import suspects
from pyflannel.node.suspects import describe, report_suspects

NETWORK = IPv4Network("10.5.0.0/16")
MAC = MacAddress.parse("02:00:00:00:00:01")
LEASES = (
    parse_lease_untrusted(
        KeyValue(
            b"/coreos.com/network/subnets/10.5.2.0-24",
            b'{"PublicIP":"192.0.2.2","BackendType":"vxlan",'
            b'"BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:02"}}',
            1, 1, 1, 0,
        )
    ),
)  # fmt: skip


def suspect(reason: str, mac: str = "02:00:00:00:00:02") -> Suspect:
    return Suspect(
        reason, IPv4Address("203.0.113.8"), MacAddress.parse(mac), IPv4Address("10.5.3.7")
    )


def test_a_spoofed_inner_source_is_named() -> None:
    sentence = describe(suspect("inner_source"), LEASES, "dropping")
    assert sentence.startswith("dropping packets from 203.0.113.8 (inner source MAC 02:00:")
    assert "inner source 10.5.3.7 is not in the sender's subnet" in sentence


def test_a_stranger_has_no_lease() -> None:
    sentence = describe(suspect("unknown_vtep", "02:00:00:00:00:99"), LEASES, "dropping")
    assert "no lease has this address and MAC" in sentence


def test_a_node_behind_nat_gets_its_lease_and_the_remedy_named() -> None:
    sentence = describe(suspect("unknown_vtep"), LEASES, "dropping")
    assert "belongs to lease 10.5.2.0/24, which advertises 192.0.2.2" in sentence
    assert sentence.endswith("--peer-source=203.0.113.8/32=10.5.2.0/24")


class Samples:
    """Gives out what the fast path would, a batch a call."""

    def __init__(self, *batches: list[str]) -> None:
        self._batches = list(batches)
        self.all_taken = asyncio.Event()

    def take_suspects(self) -> list[Suspect]:
        if not self._batches:
            self.all_taken.set()
            return []
        sources = self._batches.pop(0)
        return [replace(suspect("unknown_vtep"), outer_source=IPv4Address(x)) for x in sources]


@pytest.mark.parametrize(
    ("dropped", "verb"), [(True, "dropping"), (False, "accepting (--anti-spoofing=log)")]
)
async def test_each_source_is_told_once_until_too_many_others_came(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, dropped: bool, verb: str
) -> None:
    monkeypatch.setattr(suspects, "INTERVAL_SECONDS", 0)
    monkeypatch.setattr(suspects, "SOURCES_REMEMBERED", 2)
    one, two, three = "203.0.113.1", "203.0.113.2", "203.0.113.3"
    samples = Samples([one, one, two], [], [two, one], [three, one, three])
    report = asyncio.ensure_future(
        report_suspects(cast(Context, samples), lambda: LEASES, dropped=dropped)
    )
    await asyncio.wait_for(samples.all_taken.wait(), 10)
    report.cancel()
    told = [x.getMessage() for x in caplog.records if x.levelno == logging.WARNING]
    assert [line.split(" (inner")[0] for line in told] == [
        f"{verb} packets from {source}" for source in (one, two, three, one)
    ]
