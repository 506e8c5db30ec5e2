"""Speaks with the service supervisor: tells our state (sd_notify(3)), and has descriptors kept.

Silent where there is none. systemd keeps what FDSTORE=1 hands over while the service restarts, and
gives it back by LISTEN_FDS (sd_listen_fds(3)); packets queue up in it meanwhile.
"""

from __future__ import annotations

import os
import socket
from collections.abc import MutableMapping, Sequence

FIRST_KEPT_FD = 3
# The kernel takes 253 at a time (SCM_MAX_FD).
FDS_PER_MESSAGE = 128

PATIENCE_SECONDS = 0.1


def notify(state: str, fds: Sequence[int] = ()) -> None:
    """Send a state such as `READY=1` to $NOTIFY_SOCKET; one who is gone or deaf is ignored."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path.startswith(("/", "@")):
        return
    address = "\0" + path[1:] if path.startswith("@") else path
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        # One that does not read may cost a moment, never the event loop.
        sock.settimeout(PATIENCE_SECONDS)
        try:
            sock.connect(address)
            socket.send_fds(sock, [state.encode()], list(fds))
        except OSError:
            return


def keep_descriptors(name: str, fds: Sequence[int]) -> None:
    """Have descriptors kept under a name; those that are kept already are not kept twice."""
    for start in range(0, len(fds), FDS_PER_MESSAGE):
        notify(f"FDSTORE=1\nFDNAME={name}", fds[start : start + FDS_PER_MESSAGE])


def take_kept_descriptors(environ: MutableMapping[str, str]) -> list[int]:
    """Return the descriptors that were kept for us; the variables go, as no child may use them."""
    pid, count = environ.pop("LISTEN_PID", ""), environ.pop("LISTEN_FDS", "")
    environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or not count.isdecimal():
        return []
    return list(range(FIRST_KEPT_FD, FIRST_KEPT_FD + int(count)))
