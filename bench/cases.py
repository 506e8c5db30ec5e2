"""What is measured on a stack, and which numbers come out of it."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, quantiles

from bench.machine import CpuUse, CpuWindow
from bench.variants import Stack

UDP_LOAD = Path(__file__).parent / "bin/udp_load"
IDLE_INTERVAL_SECONDS, LOADED_INTERVAL_SECONDS = 0.02, 0.01


@dataclass(frozen=True, slots=True)
class Metric:
    """A number of a case: its unit, and whether more of it is better."""

    title: str
    unit: str
    more_is_better: bool


GBITS = Metric("throughput", "Gbit/s", True)
CPU = Metric("CPU, both ends", "s/GB", False)
RATE = Metric("< 1 % loss", "kpackets/s", True)
RTT_MEAN = Metric("round trip, mean", "us", False)
RTT_P50 = Metric("round trip, p50", "us", False)
RTT_P99 = Metric("round trip, p99", "us", False)


@dataclass(frozen=True, slots=True)
class Sample:
    """What one run of a case gave; `notes` are numbers beside the metrics."""

    values: dict[Metric, float]
    notes: dict[str, float]
    cpu: CpuUse


@dataclass(frozen=True, slots=True)
class Case:
    """A measurement; `measure` gets a stack and the seconds it may take."""

    title: str
    measure: Callable[[Stack, float], Sample]


def _start_ping(stack: Stack, interval: float, seconds: float) -> subprocess.Popen[str]:
    # fmt: off
    return subprocess.Popen(
        ["ip", "netns", "exec", stack.source.name, "ping", "-i", str(interval),
         "-c", str(max(int(seconds / interval), 2)), "-W", "1", str(stack.target)],
        stdout=subprocess.PIPE, text=True,
    )
    # fmt: on


def _round_trips(pinging: subprocess.Popen[str]) -> tuple[dict[Metric, float], dict[str, float]]:
    """Wait for a ping to end; return its metrics and notes."""
    text = pinging.communicate()[0]
    times = [float(ms) * 1000 for ms in re.findall(r"time=([\d.]+) ms", text)]
    counts = re.search(r"(\d+) packets transmitted, (\d+) received", text)
    assert len(times) > 1 and counts, f"ping failed: {text}"
    cuts = quantiles(times, n=100, method="inclusive")
    values = {RTT_MEAN: mean(times), RTT_P50: cuts[49], RTT_P99: cuts[98]}
    return values, {"pings": float(counts[1]), "pings_lost": float(counts[1]) - float(counts[2])}


def tcp(streams: int, *flags: str, congestion: str = "cubic", pings: bool = False) -> Case:
    """Throughput of parallel TCP streams by iperf3, CPU time per GB, round trips beside it."""

    def measure(stack: Stack, seconds: float) -> Sample:
        window = CpuWindow()
        pinging = _start_ping(stack, LOADED_INTERVAL_SECONDS, seconds * 0.9) if pings else None
        # fmt: off
        report = json.loads(stack.source.exec(
            "iperf3", "-J", "-c", str(stack.target), "-t", str(seconds), "-P", str(streams),
            "-C", congestion, *flags,
        ))
        # fmt: on
        cpu = window.end()
        end = report["end"]
        values = {
            GBITS: end["sum_received"]["bits_per_second"] / 1e9,
            CPU: cpu.used / (end["sum_received"]["bytes"] / 1e9),
        }
        notes = {"retransmits": float(end["sum_sent"]["retransmits"])}
        if pinging:
            more_values, more_notes = _round_trips(pinging)
            values |= more_values
            notes |= more_notes
        return Sample(values, notes, cpu)

    title = f"TCP, {streams} stream{'s' * (streams > 1)}{', reverse' * ('-R' in flags)}"
    return Case(f"{title}, {congestion}", measure)


def udp(size: int, flows: int) -> Case:
    """The highest packet rate at less than 1 % loss; `size` is the UDP payload in bytes."""

    def measure(stack: Stack, seconds: float) -> Sample:
        window = CpuWindow()
        threads = min(flows, os.cpu_count() or 1)
        # fmt: off
        done = subprocess.run(
            [UDP_LOAD, "--from", stack.source.name, "--to", stack.sink.name,
             "--address", str(stack.target), "--size", str(size), "--flows", str(flows),
             "--threads", str(threads), "--seconds", str(seconds)],
            check=True, capture_output=True, text=True,
        )
        # fmt: on
        report = json.loads(done.stdout)
        assert report["corrupt"] == 0, f"{stack.variant.name} changed packets: {report}"
        notes = {name: float(report[name]) for name in ("reordered", "duplicated", "refused")}
        return Sample({RATE: report["rate"] / 1e3}, notes, window.end())

    return Case(f"UDP, {size} B, {flows} flow{'s' * (flows > 1)}", measure)


def idle_round_trip() -> Case:
    """Round trips while nothing else moves."""

    def measure(stack: Stack, seconds: float) -> Sample:
        window = CpuWindow()
        values, notes = _round_trips(_start_ping(stack, IDLE_INTERVAL_SECONDS, seconds))
        return Sample(values, notes, window.end())

    return Case("round trip, idle", measure)


CASES: dict[str, Case] = {
    "tcp1": tcp(1),
    "tcp1-reverse": tcp(1, "-R"),
    "tcp4": tcp(4, pings=True),
    "tcp1-bbr": tcp(1, congestion="bbr"),
    "tcp4-bbr": tcp(4, congestion="bbr", pings=True),
    "udp64": udp(64, 1),
    "udp64-8": udp(64, 8),
    "udp1400": udp(1400, 1),
    "rtt": idle_round_trip(),
}

QUICK = ("tcp1", "tcp1-reverse", "tcp4", "udp64", "rtt")
