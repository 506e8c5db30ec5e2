"""What the operator is told: suspects in the log, counters on the metrics page."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network
from typing import cast

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pyflannel import suspects
from pyflannel.control.family_routes import Place
from pyflannel.control.lease import KeyValue, parse_lease_untrusted
from pyflannel.control.lease_table import LeaseTable
from pyflannel.dataplane.fastpath import (
    DROP_REASONS,
    AntiSpoofing,
    Context,
    FastpathConfig,
    Suspect,
)
from pyflannel.dataplane.route import MacAddress, Vni
from pyflannel.health import Readiness
from pyflannel.metrics import render
from pyflannel.suspects import describe, report_suspects
from tests.dataplane.test_fastpath import PEER

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


def page(made: Context | None, table: LeaseTable | None, ready: Readiness) -> dict[str, float]:
    """Return the page's samples, labels as Prometheus writes them."""
    found = {}
    for family in text_string_to_metric_families(render(made, table, ready).decode()):
        for sample in family.samples:
            labels = ",".join(f'{name}="{value}"' for name, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def test_a_node_that_starts_has_one_sample() -> None:
    readiness = Readiness()
    assert page(None, None, readiness) == {"pyflannel_ready": 0.0}
    readiness.clear("starting")
    assert page(None, None, readiness) == {"pyflannel_ready": 1.0}


def test_every_drop_reason_and_peer_has_its_sample_from_the_start() -> None:
    made = Context(FastpathConfig(Vni(1), MAC, NETWORK, AntiSpoofing.ENFORCE))
    made.replace(PEER)
    try:
        samples = page(made, None, Readiness())
    finally:
        made.close()
    del samples["pyflannel_ready"]
    assert set(samples.values()) == {0.0}
    assert set(samples) == {
        *(f'pyflannel_drops_total{{reason="{reason}"}}' for reason in DROP_REASONS),
        *(
            f'pyflannel_{name}_total{{direction="{direction}"}}'
            for name in ("packets", "bytes")
            for direction in ("encap", "decap")
        ),
        *(
            f'pyflannel_peer_{name}_total{{direction="{direction}",subnet="10.5.2.0/24"}}'
            for name in ("packets", "bytes")
            for direction in ("encap", "decap")
        ),
    }


def test_leases_are_counted() -> None:
    table = LeaseTable([Place(NETWORK, IPv4Address("192.0.2.1"))], 8472)
    value = (
        '{{"PublicIP":"{}","BackendType":"vxlan","BackendData":{{"VtepMAC":"02:00:00:00:00:{}"}}}}'
    )
    for revision, (key, text) in enumerate(
        (
            ("10.5.2.0-24", value.format("192.0.2.2", "02")),
            ("10.5.2.0-25", value.format("192.0.2.3", "03")),
            ("foo", "bar"),
        ),
        1,
    ):
        name = f"/coreos.com/network/subnets/{key}".encode()
        table.put(KeyValue(name, text.encode(), revision, revision, 1, 0))
    samples = page(None, table, Readiness())
    assert samples["pyflannel_peers"] == 1
    assert samples["pyflannel_quarantined_leases"] == 1
    assert samples["pyflannel_bad_leases"] == 1
