"""A TCP transfer of random bytes whose checksum is compared at the other end."""

from __future__ import annotations

import ctypes
import hashlib
import os
import random
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.variants import Stack

PORT, CHUNK = 5300, 1 << 20
DEADLINE_SECONDS = 120
CLONE_NEWNET = 0x40000000


def _socket_in(netns: str) -> socket.socket:
    """Make a TCP socket in a namespace; leaves the calling thread there."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = os.open(Path("/run/netns") / netns, os.O_RDONLY)
    try:
        if libc.setns(fd, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns {netns}")
    finally:
        os.close(fd)
    made = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.settimeout(DEADLINE_SECONDS)
    return made


def _receive(listening: socket.socket) -> str:
    digest = hashlib.sha256()
    with listening, listening.accept()[0] as connection:
        connection.settimeout(DEADLINE_SECONDS)
        while chunk := connection.recv(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _send(sending: socket.socket, address: str, megabytes: int, seed: int) -> str:
    digest = hashlib.sha256()
    source = random.Random(seed)
    data = memoryview(source.randbytes(4 * CHUNK))
    left = megabytes * CHUNK
    with sending:
        sending.connect((address, PORT))
        while left > 0:
            # Odd lengths make segments end at odd places.
            start, length = source.randrange(3 * CHUNK), source.randrange(1, CHUNK)
            chunk = data[start : start + length]
            digest.update(chunk)
            sending.sendall(chunk)
            left -= length
    return digest.hexdigest()


def transfer_is_intact(stack: Stack, megabytes: int, seed: int = 0) -> bool:
    """Send some megabytes from source to sink; whether all of them arrived unchanged."""
    # A thread for each namespace: setns moves the thread for good.
    with ThreadPoolExecutor(1) as source, ThreadPoolExecutor(1) as sink:
        listening = sink.submit(_socket_in, stack.sink.name).result()
        listening.bind((str(stack.target), PORT))
        listening.listen()
        received = sink.submit(_receive, listening)
        sending = source.submit(_socket_in, stack.source.name).result()
        sent = source.submit(_send, sending, str(stack.target), megabytes, seed)
        return sent.result() == received.result()
