"""The local unix socket over which an operator's command, or a successor, speaks with the daemon.

One JSON object a line in, one a line out, any number of them over one connection in turn:

    {"request": "trace", "address": "10.5.72.9"}   ->   {"result": …}
    {"request": "nope"}                            ->   {"error": "one sentence"}

The server knows no request: each is a coroutine, which gets the object and the connection. One that
passes descriptors sends or receives them on the connection itself (socket.send_fds), before it
returns. What a client sends is untrusted, and so is how slowly it reads; only root and the daemon's
own user are served. Decision 25.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fnmatch
import json
import logging
import os
import socket
import stat
import struct
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from pyflannel.control.patience import within
from pyflannel.dataplane.refusal import Refusal

log = logging.getLogger(__name__)

Request = Callable[[Mapping[str, Any], socket.socket], Awaitable[object]]
"""Serves one request: returns what becomes JSON, or raises Refusal."""

REQUEST_BYTES = 65536
IDLE_SECONDS = 60.0
SEND_SECONDS = 30.0
ANSWER_SECONDS = 5.0
CONNECTIONS_MAX = 16

_UCRED = struct.Struct("iII")


def socket_path(folder: Path, vni: int) -> Path:
    """Return where the daemon of a VNI listens."""
    return folder / f"pyflannel-{vni}.sock"


class ControlServer:
    """Serves requests until it is closed; closing leaves a successor's socket alone."""

    def __init__(self, path: Path, requests: Mapping[str, Request]) -> None:
        self._path = path
        self._requests = requests
        self._tasks: set[asyncio.Task[None]] = set()
        self._listener: socket.socket | None = None
        self._inode = 0

    async def start(self, *, replace: bool = False) -> None:
        """Listen, in place of a socket that nobody serves any more; Refusal if that cannot be.

        With `replace` also in place of one that is served, whose process has handed over to us.
        """
        self._listener = _listen(self._path, replace=replace)
        self._inode = self._path.stat().st_ino
        self._spawn(self._accept(self._listener))

    async def close(self, *, keep: bool = False) -> None:
        """End all connections and remove the socket, unless it is a successor's now (`keep`)."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._listener is not None:
            self._listener.close()
            if keep:
                return
            with contextlib.suppress(OSError):
                if self._path.stat().st_ino == self._inode:
                    self._path.unlink()

    def _spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(listener)
            except OSError as error:
                log.warning("%s: cannot accept a connection: %s", self._path, error.strerror)
                await asyncio.sleep(1)
                continue
            if len(self._tasks) > CONNECTIONS_MAX:
                connection.close()
            else:
                self._spawn(self._serve(connection))

    async def _serve(self, connection: socket.socket) -> None:
        lines = _Lines(connection)
        with connection, contextlib.suppress(OSError, asyncio.TimeoutError):
            if why := _stranger(connection):
                await _send(connection, {"error": why})
                return
            while line := await within(IDLE_SECONDS, lines.next()):
                answer = await self._answer(line, connection)
                await within(SEND_SECONDS, _send(connection, answer))
                if not line.endswith(b"\n"):
                    return

    async def _answer(self, line: bytes, connection: socket.socket) -> dict[str, object]:
        try:
            request = json.loads(line)
        except (ValueError, RecursionError):
            return {"error": "a request is one JSON object on a line of at most 64 KiB"}
        name = request.get("request") if isinstance(request, dict) else None
        serve = self._requests.get(name) if isinstance(name, str) else None
        if serve is None:
            return {"error": f"no request {name!r:.80}; there are: {', '.join(self._requests)}"}
        try:
            return {"result": await serve(request, connection)}
        except Refusal as error:
            return {"error": str(error)}


class _Lines:
    """Lines of a connection."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._buffer = b""

    async def next(self) -> bytes:
        """Return a line, or its beginning without a newline if it is too long; empty at the end."""
        loop = asyncio.get_running_loop()
        while b"\n" not in self._buffer:
            if len(self._buffer) > REQUEST_BYTES:
                return self._buffer
            received = await loop.sock_recv(self._connection, REQUEST_BYTES)
            if not received:
                return b""
            self._buffer += received
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line + b"\n"


async def _send(connection: socket.socket, answer: Mapping[str, object]) -> None:
    line = json.dumps(answer, separators=(",", ":")).encode() + b"\n"
    await asyncio.get_running_loop().sock_sendall(connection, line)


def _stranger(connection: socket.socket) -> str | None:
    """Return why this client is not served, None for root and for our own user (unix(7))."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    _, user, _ = _UCRED.unpack(credentials)
    if user in (0, os.geteuid()):
        return None
    return f"user {user} may not ask; run the command as root or as user {os.geteuid()}"


def _listen(path: Path, *, replace: bool) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        bound = path.with_name(f".{path.name}.{os.getpid()}") if replace else path
        _remove_stale(bound)
        # bind() gives the file this mode at once; a umask would be that of all threads.
        os.fchmod(listener.fileno(), 0o600)
        listener.bind(str(bound))
        listener.listen(CONNECTIONS_MAX)
        if replace:
            bound.replace(path)
    except OSError as error:
        listener.close()
        # A path of more than 107 bytes has no errno.
        why = error.strerror or str(error)
        raise Refusal(
            f"{path}: cannot listen for status and reload ({why}); "
            "choose another folder with --control-dir"
        ) from error
    except BaseException:
        listener.close()
        raise
    return listener


def _remove_stale(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise Refusal(f"{path} is in the way of our control socket and is none; remove it")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        if probe.connect_ex(str(path)) not in (errno.ECONNREFUSED, errno.ENOENT):
            raise Refusal(
                f"{path} is served by another pyflannel-udp of the same VNI; stop it, or give one "
                "of them another --control-dir"
            )
    path.unlink(missing_ok=True)


def find_socket(folder: Path, vni: int | None) -> Path:
    """Return the socket of the daemon of a VNI, or of the only one; Refusal otherwise."""
    if vni is not None:
        return socket_path(folder, vni)
    try:
        names = fnmatch.filter(os.listdir(folder), "pyflannel-*.sock")
        found = sorted(folder / name for name in names)
    except PermissionError:
        raise Refusal(f"{folder}: may not be read; run the command as root") from None
    except OSError:
        found = []
    if not found:
        raise Refusal(
            f"no pyflannel-udp runs here, or it waits for etcd (its log says so): there is no "
            f"pyflannel-<VNI>.sock in {folder}; start it, or name its folder with --control-dir"
        )
    if len(found) > 1:
        raise Refusal(f"several daemons run here: {', '.join(map(str, found))}; choose with --vni")
    return found[0]


class NoAnswer(Refusal):
    """A daemon is there and does not answer."""


def ask(path: Path, request: str, *, seconds: float = ANSWER_SECONDS, **arguments: object) -> Any:
    """Ask a running daemon and return the result; Refusal with its sentence or ours."""
    line = json.dumps({"request": request, **arguments}).encode() + b"\n"
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(seconds)
            connection.connect(str(path))
            connection.sendall(line)
            with connection.makefile("rb") as answers:
                answer = answers.readline()
    except (FileNotFoundError, ConnectionRefusedError):
        raise Refusal(f"no pyflannel-udp runs here: nobody listens at {path}; start it") from None
    except PermissionError:
        raise Refusal(f"{path}: may not be opened; run the command as root") from None
    except OSError as error:
        why = f"in {seconds:.0f} s" if isinstance(error, TimeoutError) else f"({error})"
        raise NoAnswer(
            f"the daemon at {path} gives no answer {why}; look at its log, and restart it if it "
            "hangs"
        ) from None
    try:
        found = json.loads(answer)
        if "error" in found:
            raise Refusal(found["error"])
        return found["result"]
    except (ValueError, TypeError, KeyError):
        raise Refusal(f"{path}: the answer is none of pyflannel-udp's: {answer!r:.80}") from None
