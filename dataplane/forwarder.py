"""Lets a packet worker run: on the event loop, or in threads of its own.

It knows when a worker gets its turn, and nothing of packets. The worker's own epoll descriptor is
what the loop watches: a loop that saw the sockets themselves would drop one for good at its first
EPOLLERR (uvloop does). A turn is bounded, so timers and the control plane run in between.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Callable
from enum import Enum

from pyflannel.dataplane.fastpath import Context, Worker, WorkerIo
from pyflannel.dataplane.refusal import Refusal

log = logging.getLogger(__name__)

SETTLED_SECONDS = 1.0
"""By then every packet thread has asked for its priority."""


class Workers(Enum):
    """Who turns the worker; the value is what `--workers` calls it."""

    LOOP = "0"
    """The event loop."""
    ONE = "1"
    """A thread for both directions."""
    TWO = "2"
    """A thread for each direction."""
    AUTO = "auto"
    """A thread for both directions, and under load one more for the bulk of each."""


THREADS = {Workers.ONE: 1, Workers.TWO: 2, Workers.AUTO: 3}


class Forwarder:
    """Forwards between TUN queues and the underlay sockets until it is closed.

    `on_ended` is called, with the reason, when it ends by itself: the TUN device is gone, or a
    thread has failed. It may be started again then.
    """

    def __init__(
        self, context: Context, workers: Workers, on_ended: Callable[[OSError], None]
    ) -> None:
        self._context = context
        self._workers = workers
        self._on_ended = on_ended
        self._worker: Worker | None = None

    @property
    def is_running(self) -> bool:
        """Whether it has been started and has not ended."""
        return self._worker is not None

    @property
    def threads(self) -> int:
        """How many threads move packets now; 0 when the event loop does, or nobody."""
        return 0 if self._worker is None else self._worker.threads

    @property
    def silence(self) -> float:
        """For how many seconds packets may have had no turn; a loop that can ask turns itself."""
        if self._worker is None or self._workers is Workers.LOOP:
            return 0.0
        return self._worker.silence()

    def start(self, io: WorkerIo) -> None:
        """Begin to forward; the descriptors stay the caller's and must outlive `close`.

        Raises OSError, or Refusal when no thread can be had, and then leaves nothing behind.
        """
        assert self._worker is None
        worker = self._context.worker(io)
        if self._workers is not Workers.LOOP:
            self._start_threads(worker)
            asyncio.get_running_loop().call_later(SETTLED_SECONDS, self._check_schedule)
        self._worker = worker
        asyncio.get_running_loop().add_reader(worker.fileno(), self._on_readable)

    def _start_threads(self, worker: Worker) -> None:
        try:
            worker.start(THREADS[self._workers])
        except OSError as error:
            worker.close()
            if error.errno != errno.EAGAIN:
                raise
            raise Refusal(
                "no thread for packets can be started: allow more tasks (systemd: TasksMax=, "
                "docker run: --pids-limit), or use --workers=0"
            ) from None

    def _check_schedule(self) -> None:
        if self._worker is not None and not self._worker.runs_as_scheduled:
            log.warning(
                "packet threads run at normal priority, as CAP_SYS_NICE is missing or a filter "
                "forbids it (systemd: RestrictRealtime=, SystemCallFilter=): expect higher latency "
                "under load; grant it, or use --sched=normal"
            )

    def _on_readable(self) -> None:
        assert self._worker is not None
        try:
            if self._workers is Workers.LOOP:
                self._worker.turn()
            else:
                self._worker.check()
        except OSError as error:
            self.close()
            self._on_ended(error)

    def close(self) -> None:
        """Stop forwarding behind the present batch; may be called again."""
        if self._worker is not None:
            asyncio.get_running_loop().remove_reader(self._worker.fileno())
            self._worker.close()
            self._worker = None
