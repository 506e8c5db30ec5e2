"""Tells the service supervisor about our state (sd_notify(3)); silent where there is none."""

from __future__ import annotations

import os
import socket

PATIENCE_SECONDS = 0.1


def notify(state: str) -> None:
    """Send a state such as `READY=1` to $NOTIFY_SOCKET; one who is gone or deaf is ignored."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path.startswith(("/", "@")):
        return
    address = "\0" + path[1:] if path.startswith("@") else path
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        # One that does not read may cost a moment, never the event loop.
        sock.settimeout(PATIENCE_SECONDS)
        try:
            sock.sendto(state.encode(), address)
        except OSError:
            return
