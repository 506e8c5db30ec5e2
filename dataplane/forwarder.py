"""Puts the packet workers on the event loop.

It knows when to give a worker its turn, and nothing of packets. The worker's own epoll descriptor
is what the loop watches: a loop that saw the sockets themselves would drop one for good at its
first EPOLLERR (uvloop does). A turn is bounded, so timers and the control plane run in between.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from pyflannel.dataplane.fastpath import Context, Worker


class Forwarder:
    """Forwards between a TUN queue and the underlay sockets until it is closed.

    `on_lost` is called once, with the reason, when the TUN device disappears.
    """

    def __init__(self, context: Context, on_lost: Callable[[OSError], None]) -> None:
        self._context = context
        self._on_lost = on_lost
        self._worker: Worker | None = None

    def start(self, tun_fd: int, receive_fd: int, send_fds: Sequence[int]) -> None:
        """Begin to forward; the descriptors stay the caller's and must outlive `close`."""
        assert self._worker is None
        self._worker = self._context.worker(tun_fd, receive_fd, send_fds)
        asyncio.get_running_loop().add_reader(self._worker.fileno(), self._turn)

    def _turn(self) -> None:
        assert self._worker is not None
        try:
            self._worker.turn()
        except OSError as error:
            self.close()
            self._on_lost(error)

    def close(self) -> None:
        """Stop forwarding; may be called again."""
        if self._worker is not None:
            asyncio.get_running_loop().remove_reader(self._worker.fileno())
            self._worker.close()
            self._worker = None
