"""The demo: what it says where the kernel has no vxlan device; that it leaves nothing behind."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.lab import hosts
from tests.lab.hosts import Lab, lab, run, wait_until
from tests.lab.require import require_program, require_root

ROOT = Path(__file__).parent.parent.parent

# Answers as `ip` does where the kernel has no vxlan module, and is `ip` for everything else.
IP_WITHOUT_VXLAN = """#!/bin/sh
case " $* " in *" type vxlan "*) echo "Error: Unknown device type." >&2; exit 2 ;; esac
exec {ip} "$@"
"""


@pytest.fixture(autouse=True)
def needs() -> None:
    require_root()
    for program in ("ip", "bridge", "ethtool", "etcd", "etcdctl", "ping", "iperf3", "ss"):
        require_program(program)


def left_behind(tag: str, session: int) -> list[str]:
    """Return namespaces and folders with a tag, and processes with it or of a session."""
    found = [line for line in run("ip", "netns", "list").splitlines() if line.startswith(tag)]
    found += [str(path) for path in Path("/tmp").glob(f"{tag}*")]
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
            command = (stat.parent / "cmdline").read_text()
            if (int(fields[3]) == session or tag in command) and fields[0] != "Z":
                found.append(command)
        except OSError:
            continue  # it has ended
    return found


def run_demo(stop_at: str, stop: Callable[[subprocess.Popen[str]], None], path: str) -> list[str]:
    """Run the demo until it prints something, stop it, and return its lines; nothing is left."""
    demo = subprocess.Popen(
        [sys.executable, "-m", "bench.demo"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PATH": path},
        start_new_session=True,
    )
    lines: list[str] = []
    assert demo.stdout is not None
    for line in demo.stdout:
        lines.append(line.rstrip())
        if stop_at in line:
            stop(demo)
    demo.wait(60)
    (tag,) = re.findall(r"\((pfu-\w+)-sw\)", "\n".join(lines))
    wait_until(lambda: not left_behind(tag, demo.pid), "nothing is left of the demo")
    return [*lines, f"exit code {demo.returncode}"]


def test_without_a_kernel_device_it_runs_three_of_ours_until_ctrl_c(tmp_path: Path) -> None:
    shim = tmp_path / "ip"
    shim.write_text(IP_WITHOUT_VXLAN.format(ip=shutil.which("ip")))
    shim.chmod(0o755)

    def ctrl_c(demo: subprocess.Popen[str]) -> None:
        os.killpg(demo.pid, signal.SIGINT)

    lines = run_demo("iperf3, host to host", ctrl_c, f"{tmp_path}:{os.environ['PATH']}")
    text = "\n".join(lines)
    assert "this kernel has no vxlan device: all three hosts run pyflannel-udp" in lines
    assert len(re.findall("^pyflannel-udp  +on 192", text, re.MULTILINE)) == 3
    assert "kernel vxlan" not in text
    assert len(re.findall(r" ok\b", text)) == 6
    assert "LOST" not in text
    assert lines[-2:] == [
        "interrupted; everything that was started is stopped and removed",
        "exit code 130",
    ]


def test_sigterm_in_the_middle_leaves_nothing() -> None:
    lines = run_demo("pyflannel-udp  ", lambda demo: demo.terminate(), os.environ["PATH"])
    assert lines[-1] == f"exit code {128 + signal.SIGTERM}"


@pytest.mark.parametrize("where", ["start_switch", "start_etcd", "add_host"])
def test_a_lab_interrupted_while_it_is_made_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    made: list[Lab] = []
    step = getattr(Lab, where)

    def interrupted(self: Lab) -> None:
        made.append(self)
        step(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(hosts.Lab, where, interrupted)
    with pytest.raises(KeyboardInterrupt), lab(1):
        pass
    tag = made[0].switch.name.removesuffix("-sw")
    assert left_behind(tag, -1) == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
