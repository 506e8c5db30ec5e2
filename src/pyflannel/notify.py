"""Tells the service supervisor about our state (sd_notify(3)); silent where there is none."""

from __future__ import annotations

import os
import socket


def notify(state: str) -> None:
    """Send one state such as `READY=1` to $NOTIFY_SOCKET; a supervisor that is gone is ignored."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path.startswith(("/", "@")):
        return
    address = "\0" + path[1:] if path.startswith("@") else path
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        try:
            sock.sendto(state.encode(), address)
        except OSError:
            return
