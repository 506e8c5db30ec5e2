"""As much of systemd as a restart needs: a notify socket that keeps descriptors (FDSTORE=1).

Run as a program in front of a command it is the child's side: it gets the descriptors, numbers them
from 3 on, sets the variables of sd_listen_fds(3) and becomes the command.
"""

from __future__ import annotations

import os
import socket
import sys
from contextlib import ExitStack
from pathlib import Path

FDS_MAX = 253
OUT_OF_THE_WAY = 500
START_SECONDS = 30.0


class Supervisor:
    """Keeps what a service hands over, and gives it to the next process; closes all at the end."""

    def __init__(self, folder: Path) -> None:
        self.states: list[str] = []
        self.kept: list[int] = []
        self._stack = ExitStack()
        self._notify = self._bind(socket.SOCK_DGRAM, folder / "notify")
        self._notify.setblocking(False)
        self._starts = self._bind(socket.SOCK_STREAM, folder / "starts")
        self._starts.listen()
        self._starts.settimeout(START_SECONDS)
        names = (str(folder / "notify"), str(folder / "starts"))
        self.wrapper = (sys.executable, __file__, *names)
        """What goes in front of the service's command."""

    def _bind(self, kind: int, path: Path) -> socket.socket:
        bound = self._stack.enter_context(socket.socket(socket.AF_UNIX, kind))
        bound.bind(str(path))
        self._stack.callback(path.unlink)
        return bound

    def collect(self) -> list[str]:
        """Take in what was said meanwhile; return all that was ever said."""
        while True:
            try:
                said, fds, _, _ = socket.recv_fds(self._notify, 4096, FDS_MAX)
            except BlockingIOError:
                return self.states
            self.states.append(said.decode())
            self.kept += fds

    def give(self) -> int:
        """Give what is kept to the process that is being started; return how much that is."""
        self.collect()
        connection, _ = self._starts.accept()
        with connection:
            socket.send_fds(connection, [b"."], self.kept)
        return len(self.kept)

    def close(self) -> None:
        """Let go of everything."""
        self._stack.close()
        for fd in self.kept:
            os.close(fd)


def _become(notify: str, starts: str, command: list[str]) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(starts)
        _, fds, _, _ = socket.recv_fds(connection, 1, FDS_MAX)
    # First out of the way of the numbers that they get.
    for number, fd in enumerate(fds):
        os.dup2(fd, OUT_OF_THE_WAY + number)
    for number in range(len(fds)):
        os.dup2(OUT_OF_THE_WAY + number, 3 + number)
    os.closerange(3 + len(fds), 2 * OUT_OF_THE_WAY)
    os.environ.update(NOTIFY_SOCKET=notify, LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(fds)))
    os.execvp(command[0], command)


if __name__ == "__main__":
    _become(sys.argv[1], sys.argv[2], sys.argv[3:])
