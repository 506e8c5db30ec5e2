"""Datagrams at a fixed rate, counted where they arrive; run as a program inside a container.

`load.py receive ADDRESS PORT` counts until SIGTERM and then prints received, duplicate and
reordered.
`load.py send ADDRESS PORT RATE` sends until SIGTERM and then prints sent.
"""

from __future__ import annotations

import signal
import socket
import sys
import time

TICK_SECONDS = 0.001
LAST_SECONDS = 1.0
BURST = 50
"""Packets sent at once at most, so that after a stall of the machine no queue gets a flood."""
BUFFER_BYTES = 64 << 20
# asm-generic/socket.h
_SO_RCVBUFFORCE = 33


def _socket(address: str) -> socket.socket:
    return socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)


def receive(address: str, port: int, ended: list[int]) -> None:
    """Count what comes; after SIGTERM, until nothing came for a second."""
    seen, last = bytearray(), -1
    received = duplicate = reordered = 0
    with _socket(address) as opened:
        opened.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, BUFFER_BYTES)
        opened.bind((address, port))
        opened.settimeout(LAST_SECONDS)
        print("ready", flush=True)
        while True:
            try:
                number = int.from_bytes(opened.recv(2048), "big")
            except TimeoutError:
                if ended:
                    break
                continue
            if number >= len(seen):
                seen.extend(bytes(number + 100_000 - len(seen)))
            received += 1
            duplicate += seen[number]
            reordered += number < last
            seen[number], last = 1, number
    print("counted", received, duplicate, reordered, flush=True)


def send(address: str, port: int, rate: int, ended: list[int]) -> None:
    """Send `rate` datagrams a second."""
    sent, began = 0, time.monotonic()
    with _socket(address) as opened:
        opened.connect((address, port))
        print("ready", flush=True)
        while not ended:
            due = int((time.monotonic() - began) * rate)
            for _ in range(min(due - sent, BURST)):
                opened.send(sent.to_bytes(8, "big"))
                sent += 1
            time.sleep(TICK_SECONDS)
    print("sent", sent, flush=True)


if __name__ == "__main__":
    signals: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: signals.append(number))
    if sys.argv[1] == "receive":
        receive(sys.argv[2], int(sys.argv[3]), signals)
    else:
        send(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), signals)
