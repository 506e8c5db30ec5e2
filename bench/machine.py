"""The machine under the benchmark: whose CPU time was used, whether it is quiet, what it is.

CPU time is what all cores did not spend idle, so interrupts and kernel threads that work for the
measured traffic count; the time of processes that are not ours is taken out of it and told apart.
"""

from __future__ import annotations

import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path

from bench.program import say

TICKS = os.sysconf("SC_CLK_TCK")
FOREIGN_LIMIT = 0.12
QUIET_DEADLINE_SECONDS = 300.0


@dataclass(frozen=True, slots=True)
class CpuUse:
    """CPU seconds in a window of `elapsed` seconds; `foreign`: other processes, stolen time."""

    elapsed: float
    used: float
    foreign: float

    @property
    def disturbed(self) -> bool:
        """Whether others took more of a core than a sample can bear."""
        return self.foreign > FOREIGN_LIMIT * self.elapsed


class CpuWindow:
    """Measures from its creation to `end`."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._idle, self._steal = _idle_and_steal()
        self._foreign = _foreign_processes()

    def end(self) -> CpuUse:
        """Return what was used since."""
        elapsed = time.monotonic() - self._began
        idle, steal = _idle_and_steal()
        foreign = max(_foreign_processes() - self._foreign, 0.0)
        stolen = steal - self._steal
        busy = elapsed * (os.cpu_count() or 1) - (idle - self._idle) - stolen
        return CpuUse(elapsed, max(busy - foreign, 0.0), foreign + stolen)


def _idle_and_steal() -> tuple[float, float]:
    """Return seconds that the cores were idle, and those a hypervisor took (proc(5), stat)."""
    with open("/proc/stat") as stat:
        fields = [int(word) for word in stat.readline().split()[1:]]
    return (fields[3] + fields[4]) / TICKS, fields[7] / TICKS


def _foreign_processes() -> float:
    """Return CPU seconds of user processes that are not below this one.

    Those of a process that has ended are in the account of the parent that has seen it end.
    """
    seconds: dict[int, float] = {}
    parent: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            text = (entry / "stat").read_text()
        except OSError:  # it has ended
            continue
        fields = text.rpartition(")")[2].split()
        pid = int(entry.name)
        parent[pid] = int(fields[1])
        seconds[pid] = sum(int(field) for field in fields[11:15]) / TICKS
    kernel_threads, me = 2, os.getpid()

    def is_foreign(pid: int) -> bool:
        while pid > 1:
            if pid in (me, kernel_threads):
                return False
            pid = parent.get(pid, 0)
        return True

    return sum(value for pid, value in seconds.items() if is_foreign(pid))


def wait_for_quiet() -> None:
    """Wait until nobody else uses the cores for a second, or say that it never came to that."""
    deadline = time.monotonic() + QUIET_DEADLINE_SECONDS
    told = False
    while True:
        window = CpuWindow()
        time.sleep(1)
        use = window.end()
        if not use.disturbed:
            return
        if time.monotonic() > deadline:
            say("the machine did not become quiet; numbers below are disturbed")
            return
        if not told:
            say(f"others use {use.foreign / use.elapsed:.0%} of a core; waiting for quiet")
            told = True


def describe() -> dict[str, str]:
    """Name the machine: processor, cores, kernel, distribution."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    pairs = [[part.strip() for part in line.partition(":")[::2]] for line in lines]
    models = [value for name, value in pairs if name in ("model name", "Model", "Hardware")]
    return {
        "processor": models[0] if models else platform.machine(),
        "architecture": platform.machine(),
        "cores": str(os.cpu_count()),
        "kernel": platform.release(),
        "distribution": _distribution(),
        "python": platform.python_version(),
    }


def _distribution() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except OSError:
        return "unknown"
