"""Reads the kernel's network settings, as /proc shows them; it changes none."""

from __future__ import annotations

from pathlib import Path

ROOT = Path("/proc/sys/net")

FORWARDING = {4: "ipv4/ip_forward", 6: "ipv6/conf/all/forwarding"}
"""Whether the host forwards, by address family."""


def setting(path: str) -> int | None:
    """Return a setting, None where there is none or it is hidden (systemd's ProcSubset=pid)."""
    try:
        return int((ROOT / path).read_text())
    except (OSError, ValueError):
        return None


def key(path: str) -> str:
    """Return what sysctl(8) calls a setting: a dot in a device's name is a slash there."""
    return "net." + path.translate(str.maketrans("./", "/."))
