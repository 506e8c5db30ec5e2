"""/metrics as Prometheus reads it, and the alert rules and the dashboard against the real page.

c1 -- h1 (ours) ---+
      h2 (ours) ---+-- switch, etcd
"""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from pyflannel.control.own_lease import LeaseState, OwnLease
from pyflannel.dataplane.fastpath import (
    DROP_REASONS,
    Context,
    FastpathConfig,
    PeerTraffic,
    Traffic,
)
from pyflannel.dataplane.offload import Offload
from pyflannel.dataplane.route import MacAddress, Route, Vni
from pyflannel.node.metrics import Device, Snapshot, render
from pyflannel.node.overlay import KERNEL_DROPS
from tests.lab.hosts import Host, Lab, container_address, freeze, lab, ping, wait_until
from tests.lab.require import require_program, require_root

DEPLOY = Path(__file__).parents[2] / "deploy"
DOC = Path(__file__).parents[2] / "docs" / "metrics.md"
PORT = 9464
ROOM, SENT = 100, 500
EMPTY = Snapshot(
    now=1000.0,
    monotonic=100.0,
    started=990.0,
    reasons=("starting",),
    leases=None,
    own=None,
    etcd=None,
    view=None,
    devices=(),
)

Samples = Mapping[tuple[str, frozenset[tuple[str, str]]], float]


def _parse(page: str) -> Samples:
    found = {}
    for family in text_string_to_metric_families(page):
        assert family.type in ("counter", "gauge")
        assert family.documentation.endswith("."), family.name
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in found
            found[key] = sample.value
    return found


def _value(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, frozenset(labels.items())]


@pytest.fixture
def context() -> Iterator[Context]:
    made = Context(
        FastpathConfig(Vni(1), MacAddress.parse("02:00:00:00:00:01"), IPv4Network("10.0.0.0/8"))
    )
    yield made
    made.close()


def _device(context: Context) -> Device:
    return Device("flannel.1", 1450, Offload.GSO, context.counters(), context.peers())


def _route(number: int) -> Route:
    return Route(
        IPv4Network((0x0A000000 + (number << 8), 24)),
        MacAddress(b"\x02\0" + number.to_bytes(4, "big")),
        IPv4Address(0xC0000200 + number),
    )


def test_a_node_that_starts_says_so() -> None:
    samples = _parse(render(EMPTY).decode())
    assert _value(samples, "pyflannel_ready") == 0
    assert _value(samples, "pyflannel_not_ready", reason="starting") == 1
    assert _value(samples, "pyflannel_start_time_seconds") == 990
    assert {name for name, _ in samples} == {
        "pyflannel_build_info",
        "pyflannel_start_time_seconds",
        "pyflannel_ready",
        "pyflannel_not_ready",
    }


def test_every_drop_reason_and_offload_has_a_series_from_the_start(context: Context) -> None:
    samples = _parse(render(replace(EMPTY, devices=(_device(context),))).decode())
    for reason in DROP_REASONS:
        for name in ("pyflannel_drops_total", "pyflannel_spoofed_total"):
            assert _value(samples, name, device="flannel.1", reason=reason) == 0
    for offload in Offload:
        expected = offload is Offload.GSO
        name = "pyflannel_offload"
        assert _value(samples, name, device="flannel.1", offload=str(offload)) == expected
    assert _value(samples, "pyflannel_mtu_bytes", device="flannel.1") == 1450


def test_peers(context: Context) -> None:
    peers = [
        PeerTraffic(IPv4Network("10.5.2.0/24"), Traffic(1, 2, 3, 4), 5, heard_at=90.0),
        PeerTraffic(IPv4Network("10.5.3.0/24"), Traffic(0, 0, 0, 0), 0, heard_at=None),
    ]
    device = replace(_device(context), peers=iter(peers))
    samples = _parse(render(replace(EMPTY, devices=(device,))).decode())
    subnet = "10.5.2.0/24"
    for way, packets, size in (("encap", 1, 2), ("decap", 3, 4)):
        labels = {"subnet": subnet, "direction": way}
        assert _value(samples, "pyflannel_peer_packets_total", **labels) == packets
        assert _value(samples, "pyflannel_peer_bytes_total", **labels) == size
    assert _value(samples, "pyflannel_peer_drops_total", subnet=subnet) == 5
    last_seen = "pyflannel_peer_last_seen_timestamp_seconds"
    assert _value(samples, last_seen, subnet=subnet) == 990
    assert (last_seen, frozenset({("subnet", "10.5.3.0/24")})) not in samples


def test_own_lease() -> None:
    own = OwnLease(LeaseState.HELD, expires_at=1000.0 + 86000, renewals=3, losses=1)
    samples = _parse(render(replace(EMPTY, own=own)).decode())
    assert _value(samples, "pyflannel_lease_expiry_timestamp_seconds") == 87000
    assert _value(samples, "pyflannel_lease_age_seconds") == 400
    assert _value(samples, "pyflannel_lease_state", state="held") == 1
    assert _value(samples, "pyflannel_lease_state", state="contested") == 0
    reserved = replace(own, state=LeaseState.RESERVED, expires_at=None)
    names = {name for name, _ in _parse(render(replace(EMPTY, own=reserved)).decode())}
    assert "pyflannel_lease_expiry_timestamp_seconds" not in names


@pytest.mark.alone
def test_10000_peers_take_the_loop_a_moment(context: Context) -> None:
    for number in range(10_000):
        context.replace(_route(number))
    took = []
    for _ in range(5):
        started = time.thread_time()
        snapshot = replace(EMPTY, devices=(_device(context),))
        took.append(time.thread_time() - started)
    assert min(took) < 0.02
    started = time.perf_counter()
    page = render(snapshot)
    print(f"read {min(took) * 1e3:.1f} ms, render {time.perf_counter() - started:.3f} s")
    assert page.count(b"\npyflannel_peer_packets_total{") == 20_000


@pytest.fixture(scope="module")
def nodes() -> Iterator[Lab]:
    """Two nodes that have sent and received, the second without series of peers."""
    require_root()
    for program in ("ip", "ethtool", "etcd", "etcdctl", "ping"):
        require_program(program)
    with lab(2) as made:
        made.put_config()
        for host, per_peer in zip(made.hosts, ("true", "false")):
            flags = (f"--metrics-per-peer={per_peer}", f"--tun-queue-length={ROOM}")
            made.start_daemon(host, "--healthz-port", str(PORT), *flags)
            made.add_container(host)
        container = made.hosts[0].container
        assert container is not None
        target = container_address(made.hosts[1])
        wait_until(lambda: ping(container, target), "a ping")
        yield made


@pytest.fixture(scope="module")
def page(nodes: Lab) -> Samples:
    """Samples of the first node."""
    return _parse(_get(nodes, nodes.hosts[0]))


def _get(made: Lab, host: Host, port: int = PORT) -> str:
    """Return /metrics of a host, fetched from the switch."""
    program = (
        f"import urllib.request as r;a=r.urlopen('http://{host.address}:{port}/metrics');"
        "print(a.read().decode(),end='')"
    )
    return made.switch.exec("python3", "-c", program)


def test_a_node_without_series_of_peers(nodes: Lab, page: Samples) -> None:
    samples = _parse(_get(nodes, nodes.hosts[1]))
    of_peers = {name for name, _ in page if name.startswith("pyflannel_peer_")}
    assert len(of_peers) == 4
    assert {name for name, _ in page} - {name for name, _ in samples} == of_peers
    assert _value(samples, "pyflannel_peers") == 1


def test_what_the_kernel_dropped_before_us_is_told(nodes: Lab) -> None:
    host = nodes.hosts[1]
    # From one port, so that all go to one of the device's queues.
    flood = (
        "import socket; udp = socket.socket(2, 2);"
        f"[udp.sendto(b'x', ('{container_address(nodes.hosts[0])}', 9)) for _ in range({SENT})]"
    )
    (daemon,) = host.processes
    # The kernel's own words would take room as well.
    host.exec("sysctl", "-qw", "net.ipv6.conf.flannel/1.disable_ipv6=1")
    freeze(daemon)
    try:
        host.exec("python3", "-c", flood)
    finally:
        daemon.send_signal(signal.SIGCONT)
    samples = _parse(_get(nodes, host))
    drops = {reason: _drops(samples, reason) for reason in KERNEL_DROPS}
    assert drops == {"receive_buffer": 0, "tun_queue": SENT - ROOM}
    (device,) = host.ask("status")["devices"]
    assert device["drops"] == {"tun_queue": SENT - ROOM}


def _drops(samples: Samples, reason: str) -> float:
    return _value(samples, "pyflannel_drops_total", device="flannel.1", reason=reason)


def test_the_documentation_tells_every_series_and_reason(page: Samples) -> None:
    text = DOC.read_text()
    series, reasons = text.split("## Drop reasons")
    cells = re.findall(r"^\| (`[^|]*`) \|([^|]*)\|", series, re.MULTILINE)
    told = {f"pyflannel_{name}" for names, _ in cells for name in re.findall(r"`(\w+)`", names)}
    assert told == {name for name, _ in page} | {"pyflannel_not_ready"}
    for name, labels in page:
        (row,) = (x for names, x in cells if f"`{name.removeprefix('pyflannel_')}`" in names)
        assert all(f"`{label}`" in row for label, _ in labels), name
    rows = re.findall(r"^\| (`[^|]*`) \|", reasons, re.MULTILINE)
    assert {x for row in rows for x in re.findall(r"`(\w+)`", row)} == {
        *DROP_REASONS,
        *KERNEL_DROPS,
    }


def _used(expression: str) -> Iterator[tuple[str, set[str]]]:
    """Yield each metric of a PromQL expression with the labels that it is selected by."""

    def visit(node: Any) -> Iterator[tuple[str, set[str]]]:
        if isinstance(node, promql_parser.VectorSelector):
            assert node.name is not None
            yield node.name, {matcher.name for matcher in node.matchers.matchers}
            return
        for name in ("expr", "lhs", "rhs", "vector_selector", "param"):
            inner = getattr(node, name, None)
            if inner is not None and not isinstance(inner, str):
                yield from visit(inner)
        for argument in getattr(node, "args", ()):
            yield from visit(argument)

    return visit(promql_parser.parse(expression))


def _check(samples: Samples, expression: str) -> None:
    used = list(_used(expression))
    assert used, expression
    for name, labels in used:
        exposed = [set(dict(found)) for other, found in samples if other == name]
        # A node that is ready has none of these.
        if name != "pyflannel_not_ready":
            assert exposed, f"{name} is not exposed: {expression}"
        # Prometheus adds these two at the scrape.
        for label in labels - {"instance", "job"}:
            assert all(label in found for found in exposed), f"{name} has no label {label}"
    known = {label for other, found in samples if other in dict(used) for label, _ in found}
    for grouping in re.findall(r"\b(?:by|on|without|ignoring) ?\(([^)]*)\)", expression):
        for label in set(grouping.replace(" ", "").split(",")) - {"instance", "job"}:
            assert label in known, f"nothing has a label {label}: {expression}"


def test_alert_rules_speak_of_what_is_exposed(page: Samples) -> None:
    (group,) = yaml.safe_load((DEPLOY / "prometheus-alerts.yml").read_text())["groups"]
    names = [rule["alert"] for rule in group["rules"]]
    assert len(set(names)) == len(names) > 5
    for rule in group["rules"]:
        _check(page, rule["expr"])
        assert rule["labels"]["severity"] in ("warning", "critical")
        told = " ".join(rule["annotations"].values())
        for label in re.findall(r"\$labels\.(\w+)", told):
            by = re.search(r"by \(([^)]*)\)", rule["expr"])
            known = {"instance"} | set(by.group(1).replace(" ", "").split(",") if by else ())
            known |= {"subnet"} if "pyflannel_peer_" in rule["expr"] else set()
            assert label in known, (rule["alert"], label)


def test_reasons_in_the_alert_rules_exist() -> None:
    rules = (DEPLOY / "prometheus-alerts.yml").read_text()
    named = re.findall(r'reason(?:=~|!=|=)"([^"]*)"', rules)
    assert named
    for reason in "|".join(named).split("|"):
        assert reason in {*DROP_REASONS, *KERNEL_DROPS}


def test_the_dashboard_speaks_of_what_is_exposed(page: Samples) -> None:
    board = json.loads((DEPLOY / "grafana-dashboard.json").read_text())
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) > 10
    for panel in panels:
        for target in panel["targets"]:
            expression = target["expr"].replace("$__rate_interval", "5m")
            _check(page, expression.replace("$instance", ".*"))
    used = {
        name
        for panel in panels
        for target in panel["targets"]
        for name, _ in _used(
            target["expr"].replace("$__rate_interval", "5m").replace("$instance", ".*")
        )
    }
    variable = board["templating"]["list"][1]["query"]["query"]
    told = re.fullmatch(r"label_values\((\w+), instance\)", variable)
    assert told is not None
    assert told[1] in {name for name, _ in page}
    assert "pyflannel_drops_total" in used
    # What fits into no rectangle would lie upon another panel.
    places = {
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    }
    assert len(places) == sum(x["gridPos"]["w"] * x["gridPos"]["h"] for x in panels)
    assert max(x for x, _ in places) == 23


def test_real_page(page: Samples) -> None:
    assert _value(page, "pyflannel_ready") == 1
    assert _value(page, "pyflannel_peers") == 1
    assert _value(page, "pyflannel_etcd_up") == 1
    assert _value(page, "pyflannel_packets_total", device="flannel.1", direction="decap") >= 1
    left = _value(page, "pyflannel_lease_expiry_timestamp_seconds") - time.time()
    assert 86000 < left <= 86400
    seen = [x for (name, _), x in page.items() if name.startswith("pyflannel_peer_last_seen")]
    assert len(seen) == 1
    assert abs(seen[0] - time.time()) < 60
