"""What is measured on a stack, and which numbers come out of it."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, quantiles

from bench.machine import CpuUse, CpuWindow
from bench.placement import CORES, hosts_apart
from bench.variants import Stack

UDP_LOAD = Path(__file__).parent / "bin/udp_load"
IDLE_INTERVAL_SECONDS, LOADED_INTERVAL_SECONDS = 0.02, 0.01


@dataclass(frozen=True, slots=True)
class Sample:
    """What one run of a case gave: `values` by the names of METRICS, `notes` beside them."""

    values: dict[str, float]
    notes: dict[str, float]
    cpu: CpuUse
    round_trips: list[float] = field(default_factory=list)


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


def _round_trips(
    pinging: subprocess.Popen[str],
) -> tuple[dict[str, float], dict[str, float], list[float]]:
    """Wait for a ping to end; return metrics, notes, and the round trips in microseconds."""
    text = pinging.communicate()[0]
    times = [float(ms) * 1000 for ms in re.findall(r"time=([\d.]+) ms", text)]
    counts = re.search(r"(\d+) packets transmitted, (\d+) received", text)
    assert len(times) > 1 and counts, f"ping failed: {text}"
    cuts = quantiles(times, n=100, method="inclusive")
    values = {"rtt_mean": mean(times), "rtt_p50": cuts[49], "rtt_p99": cuts[98]}
    notes = {"pings": float(counts[1]), "pings_lost": float(counts[1]) - float(counts[2])}
    return values, notes, times


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
            "throughput": end["sum_received"]["bits_per_second"] / 1e9,
            "cpu": cpu.used / (end["sum_received"]["bytes"] / 1e9),
        }
        notes = {"retransmits": float(end["sum_sent"]["retransmits"])}
        times: list[float] = []
        if pinging:
            more_values, more_notes, times = _round_trips(pinging)
            values |= more_values
            notes |= more_notes
        return Sample(values, notes, cpu, times)

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
        return Sample({"rate": report["rate"] / 1e3}, notes, window.end())

    return Case(f"UDP, {size} B, {flows} flow{'s' * (flows > 1)}", measure)


def idle_round_trip() -> Case:
    """Round trips while nothing else moves."""

    def measure(stack: Stack, seconds: float) -> Sample:
        window = CpuWindow()
        values, notes, times = _round_trips(_start_ping(stack, IDLE_INTERVAL_SECONDS, seconds))
        return Sample(values, notes, window.end(), times)

    return Case("round trip, idle", measure)


def round_trip_apart() -> Case:
    """Round trips while nothing else moves and each host has a core of its own."""
    idle = idle_round_trip()

    def measure(stack: Stack, seconds: float) -> Sample:
        with hosts_apart(stack):
            return idle.measure(stack, seconds)

    return Case("round trip, idle, a core each", measure)


CASES: dict[str, Case] = {
    **{
        f"tcp{streams}{way}": tcp(streams, *flags, pings=streams == 4 and not flags)
        for streams in (1, 4, 16)
        for way, flags in (("", ()), ("-reverse", ("-R",)))
    },
    "tcp1-bbr": tcp(1, congestion="bbr"),
    "tcp4-bbr": tcp(4, congestion="bbr", pings=True),
    **{
        f"udp{size}{suffix}": udp(size, flows)
        for size in (64, 128, 256, 512, 1024, 1400)
        for suffix, flows in (("", 1), ("-8", 8))
    },
    "rtt": idle_round_trip(),
    "rtt-apart": round_trip_apart(),
}


def what_lacks(case: str) -> str | None:
    """Return what this machine has not and a case asks for."""
    if case == "rtt-apart" and len(CORES) < 2:
        return "a second core"
    available = Path("/proc/sys/net/ipv4/tcp_available_congestion_control").read_text().split()
    if case.endswith("-bbr") and "bbr" not in available:
        return "congestion control bbr in this kernel"
    return None
