"""A stream of 100 datagrams a second to an echo, run as a program inside two containers.

`stream.py echo PORT` answers; `stream.py ADDRESS PORT` sends, writes the number of each answer to
standard output as it comes, and at SIGTERM, when all have come back or the last have had some
seconds for it, how many were sent.
"""

from __future__ import annotations

import select
import signal
import socket
import sys
import time

INTERVAL_SECONDS = 0.01
LAST_SECONDS = 5.0


def echo(port: int) -> None:
    """Send every datagram back."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as opened:
        opened.bind(("", port))
        while True:
            opened.sendto(*opened.recvfrom(2048))


def send(address: str, port: int) -> None:
    """Send until SIGTERM."""
    ended: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: ended.append(number))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as opened:
        opened.connect((address, port))
        sent, answered, due = 0, 0, time.monotonic()
        until = float("inf")
        while time.monotonic() < until and (until == float("inf") or answered < sent):
            now = time.monotonic()
            if ended and until == float("inf"):
                until = now + LAST_SECONDS
            if not ended and now >= due:
                opened.send(sent.to_bytes(8, "big"))
                sent, due = sent + 1, due + INTERVAL_SECONDS
            if select.select([opened], [], [], max(0.0, min(due, until) - now))[0]:
                answered += 1
                print(int.from_bytes(opened.recv(2048), "big"), flush=True)
    print("sent", sent, flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "echo":
        echo(int(sys.argv[2]))
    else:
        send(sys.argv[1], int(sys.argv[2]))
