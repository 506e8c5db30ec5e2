"""`make soak`: many packets through two daemons, every byte of what arrives checked.

    h1 (pyflannel-udp) eth1 ---- eth1 (pyflannel-udp) h2

At the same time: UDP in many flows and sizes, fragmented datagrams, small datagrams handed over as
super-packets, and TCP with a checksum over each transfer. Nothing may be changed, doubled or,
within a flow, reordered; loss is told, because UDP may lose under load.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass
from itertools import count

from bench.cases import UDP_LOAD
from bench.counters import read_counters
from bench.program import begin, positive, run_program, say
from bench.transfer import CHUNK, transfer_is_intact
from bench.variants import Stack, Variant, build, compile_tools, parse_variant

CHUNK_SECONDS = 2.0
UDP_PACKETS_PER_SECOND = 60_000
TRANSFER_MEGABYTES = 256
SEGMENT_BYTES = 1450 - 52  # of the overlay's MTU, without IPv4 and TCP with timestamps
REPORT_SECONDS = 10.0
# A queue that stands for so long, with nothing else arriving, was forgotten.
SETTLE_MILLISECONDS = 1000
LOADS = {
    "UDP, 8 flows": ("--size", "16-1422", "--flows", "8"),
    "UDP, fragmented": ("--size", "1423-9000", "--flows", "2", "--rate", "2000"),
    "UDP, super-packets": ("--size", "333", "--flows", "2", "--segment"),
}
# Reasons that a sound peer can cause: a full queue or socket.
BENIGN_DROPS = {
    f"drop:{reason}"
    for reason in ("receive_buffer", "tun_queue", "tun_write", "send_buffer", "encap_multicast")
}


class SoakError(Exception):
    """What was not carried as it was sent."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Packets that arrived intact, and UDP packets that did not arrive."""

    received: Counter[str]
    lost: int
    seconds: float

    @property
    def total(self) -> int:
        """All packets that arrived."""
        return self.received.total()

    def __str__(self) -> str:
        kinds = ", ".join(f"{name} {number:,}" for name, number in self.received.items())
        return f"{self.seconds:5.0f} s  {self.total:,} packets intact ({kinds}); {self.lost:,} lost"


def _udp(stack: Stack, name: str, packets: int) -> tuple[int, int]:
    """Send checked packets; return how many arrived and how many did not."""
    rate = str(UDP_PACKETS_PER_SECOND)
    port = str(9000 + list(LOADS).index(name))
    # fmt: off
    done = subprocess.run(
        [UDP_LOAD, "--from", stack.source.name, "--to", stack.sink.name, "--port", port,
         "--address", str(stack.target), "--check", "--rate", rate, "--count", str(packets),
         "--settle", str(SETTLE_MILLISECONDS), *LOADS[name]],
        check=True, capture_output=True, text=True,
    )
    # fmt: on
    report = json.loads(done.stdout)
    if any(report[fault] for fault in ("corrupt", "duplicated", "reordered", "late")):
        raise SoakError(f"{name}: {done.stdout.strip()}")
    if not report["received"]:
        raise SoakError(f"{name}: none of {report['sent']} packets arrived")
    return report["received"], report["sent"] - report["received"]


def _tcp(stack: Stack, megabytes: int, seed: int) -> tuple[int, int]:
    """Transfer with a checksum; return segments of full size that its bytes make, and 0."""
    try:
        intact = transfer_is_intact(stack, megabytes, seed)
    except OSError as error:
        raise SoakError(f"TCP: transfer {seed} did not end: {error}") from error
    if not intact:
        raise SoakError(f"TCP: the checksum of transfer {seed} differs")
    return megabytes * CHUNK // SEGMENT_BYTES, 0


def soak(stack: Stack, packets: int) -> Iterator[Progress]:
    """Load a stack until so many packets arrived, telling how far it is."""
    share = min(packets // (2 * len(LOADS)), int(UDP_PACKETS_PER_SECOND * CHUNK_SECONDS))
    megabytes = max(1, min(TRANSFER_MEGABYTES, packets * SEGMENT_BYTES // CHUNK // 2))
    received: Counter[str] = Counter()
    lost, began, seeds = 0, time.monotonic(), count()

    def start(name: str) -> Future[tuple[int, int]]:
        if name == "TCP":
            return pool.submit(_tcp, stack, megabytes, next(seeds))
        slow = "--rate" in LOADS[name]
        return pool.submit(_udp, stack, name, share // 20 if slow else share)

    with ThreadPoolExecutor(len(LOADS) + 1) as pool:
        running = {start(name): name for name in (*LOADS, "TCP")}
        while running:
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                name = running.pop(done)
                arrived, missing = done.result()
                received[name] += arrived
                lost += missing
                if received.total() < packets:
                    running[start(name)] = name
            yield Progress(received, lost, time.monotonic() - began)


def wrong_drops(counted: Counter[str]) -> dict[str, int]:
    """Return those of the counters of both hosts and daemons that a sound peer does not move."""
    return {
        name: number
        for name, number in counted.items()
        if (name.startswith("drop:") and name not in BENIGN_DROPS) or "InCsumErrors" in name
    }


def run(packets: int, variant: Variant) -> Progress:
    """Soak two daemons; SoakError when something was changed or dropped for a wrong reason."""
    compile_tools()
    with closing(build(variant, "wire-nocsum")) as stack:
        before, told = read_counters(stack), 0.0
        for progress in soak(stack, packets):
            if progress.seconds - told > REPORT_SECONDS:
                told = progress.seconds
                say(str(progress))
        if wrong := wrong_drops(read_counters(stack) - before):
            raise SoakError(f"dropped for a reason that a sound peer does not give: {wrong}")
    return progress


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.soak")
    parser.add_argument("packets", type=positive, help="at least so many arrive")
    parser.add_argument("--variant", default="ours", help="NAME[@CHECKOUT][=FLAGS] (ours)")
    given = parser.parse_args()
    try:
        given.variant = parse_variant(given.variant)
    except ValueError as error:
        parser.error(str(error))
    return given


def main() -> int:
    """Run as the command line asks for."""
    given = arguments()
    begin()
    try:
        say(f"done: {run(given.packets, given.variant)}")
    except SoakError as error:
        say(f"FAILED: {error}")
        return 1
    return 0


if __name__ == "__main__":
    run_program(main)
