"""Renders the counters of the fast path and the state of the node for Prometheus.

Everything is read when asked for, nothing is counted in Python.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from pyflannel.control.lease_table import LeaseTable
from pyflannel.dataplane.fastpath import Context
from pyflannel.health import Readiness

PREFIX = "pyflannel_"
DIRECTIONS = ("encap", "decap")


class _NodeCollector(Collector):
    def __init__(
        self, context: Context | None, table: LeaseTable | None, readiness: Readiness
    ) -> None:
        self._context = context
        self._table = table
        self._readiness = readiness

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily(
            PREFIX + "ready", "1 when the node is ready.", value=float(self._readiness.is_ready)
        )
        if self._table is not None:
            yield GaugeMetricFamily(
                PREFIX + "peers", "Peers in the table.", value=len(self._table.routes())
            )
            yield GaugeMetricFamily(
                PREFIX + "quarantined_leases",
                "Leases that are not used because they conflict.",
                value=len(self._table.quarantined()),
            )
            yield GaugeMetricFamily(
                PREFIX + "bad_leases",
                "Keys or values in etcd that are not leases.",
                value=len(self._table.bad()),
            )
        if self._context is not None:
            yield from self._packets(self._context)

    def _packets(self, context: Context) -> Iterator[Metric]:
        counters = context.counters()
        packets = CounterMetricFamily(PREFIX + "packets", "Packets.", labels=["direction"])
        size = CounterMetricFamily(PREFIX + "bytes", "Inner IP bytes.", labels=["direction"])
        for direction in DIRECTIONS:
            packets.add_metric([direction], getattr(counters.traffic, f"{direction}_packets"))
            size.add_metric([direction], getattr(counters.traffic, f"{direction}_bytes"))
        drops = CounterMetricFamily(PREFIX + "drops", "Packets dropped.", labels=["reason"])
        for reason, count in counters.drops.items():
            drops.add_metric([reason], count)
        yield from (packets, size, drops)
        labels = ["subnet", "direction"]
        peer_packets = CounterMetricFamily(PREFIX + "peer_packets", "Packets.", labels=labels)
        peer_bytes = CounterMetricFamily(PREFIX + "peer_bytes", "Inner IP bytes.", labels=labels)
        for peer in context.peers():
            for direction in DIRECTIONS:
                key = [str(peer.subnet), direction]
                peer_packets.add_metric(key, getattr(peer.traffic, f"{direction}_packets"))
                peer_bytes.add_metric(key, getattr(peer.traffic, f"{direction}_bytes"))
        yield from (peer_packets, peer_bytes)


def render(context: Context | None, table: LeaseTable | None, readiness: Readiness) -> bytes:
    """Return the metrics page; parts that are not up yet are left out."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_NodeCollector(context, table, readiness))
    return generate_latest(registry)
