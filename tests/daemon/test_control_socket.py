"""The control socket: what it answers, whom it serves, and what it bears from a client."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import stat
import sys
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from pyflannel.dataplane.refusal import Refusal
from pyflannel.management import control_socket
from pyflannel.management.control_socket import ControlServer, ask, find_socket, socket_path
from tests.lab.require import require_root

LARGE = 1 << 20


async def _echo(request: Mapping[str, Any], _: socket.socket) -> object:
    return request.get("word")


async def _refuse(_: Mapping[str, Any], __: socket.socket) -> object:
    raise Refusal("not today; come tomorrow")


async def _large(_: Mapping[str, Any], __: socket.socket) -> object:
    return "x" * LARGE


async def _descriptor(_: Mapping[str, Any], connection: socket.socket) -> object:
    read, write = os.pipe()
    os.write(write, b"passed")
    socket.send_fds(connection, [b"\0"], [read])
    os.close(read)
    os.close(write)
    return "sent"


REQUESTS = {"echo": _echo, "refuse": _refuse, "large": _large, "descriptor": _descriptor}


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Path]:
    path = socket_path(tmp_path / "new", 1)
    server = ControlServer(path, REQUESTS)
    await server.start()
    yield path
    await server.close()
    assert not path.exists()


async def _off_loop(work: Callable[..., Any], *arguments: Any) -> Any:
    return await asyncio.get_running_loop().run_in_executor(None, work, *arguments)


def _talk(path: Path, sent: bytes, answers: int) -> list[dict[str, Any]]:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(10)
        connection.connect(str(path))
        connection.sendall(sent)
        with connection.makefile("rb") as lines:
            return [json.loads(lines.readline()) for _ in range(answers)]


async def test_request_and_answer(server: Path) -> None:
    assert stat.S_IMODE(server.stat().st_mode) == 0o600
    assert await _off_loop(lambda: ask(server, "echo", word={"deep": [1]})) == {"deep": [1]}
    assert len(await _off_loop(ask, server, "large")) == LARGE
    with pytest.raises(Refusal, match="come tomorrow"):
        await _off_loop(ask, server, "refuse")
    with pytest.raises(Refusal, match="no request 'nope'; there are: echo, "):
        await _off_loop(ask, server, "nope")


async def test_many_requests_on_one_connection(server: Path) -> None:
    lines = b"".join(b'{"request":"echo","word":%d}\n' % i for i in range(100))
    answers = await _off_loop(_talk, server, lines, 100)
    assert answers == [{"result": i} for i in range(100)]


@pytest.mark.parametrize(
    "line",
    [
        b"\n",
        b"GET / HTTP/1.1\r\n",
        b"\x00\xff\n",
        b"[1]\n",
        b'{"request":["echo"]}\n',
        b"[" * 60000 + b"\n",
        b'{"request":"echo","word":"' + b"x" * 2 * control_socket.REQUEST_BYTES,
    ],
)
async def test_nonsense_is_answered_with_a_sentence(server: Path, line: bytes) -> None:
    (answer,) = await _off_loop(_talk, server, line, 1)
    assert list(answer) == ["error"]
    assert await _off_loop(lambda: ask(server, "echo", word=1)) == 1


async def test_clients_that_stall_or_vanish_do_not_matter(
    server: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("IDLE_SECONDS", "SEND_SECONDS"):
        monkeypatch.setattr(control_socket, name, 0.2)
    stalled = [socket.socket(socket.AF_UNIX) for _ in range(control_socket.CONNECTIONS_MAX + 4)]
    for connection in stalled:
        await _off_loop(connection.connect, str(server))
    # Asks for more than a socket buffer holds, and never reads.
    stalled[0].sendall(b'{"request":"large"}\n' * 8)
    for connection in stalled[1:4]:
        connection.close()
    try:
        for _ in range(100):
            try:
                assert await _off_loop(lambda: ask(server, "echo", word=1)) == 1
                return
            except Refusal:
                await asyncio.sleep(0.05)
        raise AssertionError("nobody is served any more")
    finally:
        for connection in stalled:
            connection.close()


async def test_descriptor_is_passed(server: Path) -> None:
    def take() -> tuple[bytes, bytes]:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(server))
            connection.sendall(b'{"request":"descriptor"}\n')
            _, (descriptor,), _, _ = socket.recv_fds(connection, 1, 1)
            with os.fdopen(descriptor, "rb") as pipe, connection.makefile("rb") as lines:
                return pipe.read(), lines.readline()

    assert await _off_loop(take) == (b"passed", b'{"result":"sent"}\n')


async def test_stale_socket_is_replaced_and_a_live_one_is_not(tmp_path: Path) -> None:
    path = socket_path(tmp_path, 1)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    first = ControlServer(path, REQUESTS)
    await first.start()
    second = ControlServer(path, REQUESTS)
    with pytest.raises(Refusal, match="another pyflannel-udp"):
        await second.start()
    assert await _off_loop(lambda: ask(path, "echo", word=1)) == 1
    path.unlink()
    await second.start()
    await first.close()
    assert await _off_loop(lambda: ask(path, "echo", word=2)) == 2
    await second.close()


async def test_what_cannot_be_a_socket_is_refused(tmp_path: Path) -> None:
    path = socket_path(tmp_path, 1)
    path.write_text("precious")
    with pytest.raises(Refusal, match="in the way"):
        await ControlServer(path, {}).start()
    assert path.read_text() == "precious"
    with pytest.raises(Refusal, match="--control-dir"):
        await ControlServer(socket_path(path, 1), {}).start()
    with pytest.raises(Refusal, match="--control-dir"):
        await ControlServer(socket_path(tmp_path / ("x" * 120), 1), {}).start()


async def test_another_user_is_not_served(server: Path) -> None:
    require_root()
    server.chmod(0o666)
    program = (
        "import os,socket,sys;os.chdir(sys.argv[1]);os.setuid(65534);"
        "s=socket.socket(socket.AF_UNIX);s.connect(sys.argv[2]);print(s.makefile().readline())"
    )
    words = (sys.executable, "-c", program, str(server.parent), server.name)
    asked = await asyncio.create_subprocess_exec(*words, stdout=asyncio.subprocess.PIPE)
    printed, _ = await asked.communicate()
    assert b"user 65534 may not ask" in printed


def test_a_foreign_server_is_one_sentence(tmp_path: Path) -> None:
    path = socket_path(tmp_path, 1)
    for answer in (b"", b"220 hello\n", b"[]\n", b"{}\n"):
        with socket.socket(socket.AF_UNIX) as foreign:
            foreign.bind(str(path))
            foreign.listen()

            def serve(foreign: socket.socket = foreign, answer: bytes = answer) -> None:
                connection, _ = foreign.accept()
                with connection:
                    connection.recv(4096)
                    connection.sendall(answer)

            thread = threading.Thread(target=serve)
            thread.start()
            with pytest.raises(Refusal, match="is none of"):
                ask(path, "status")
            thread.join()
        path.unlink()


def test_no_daemon_and_several_daemons_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="no pyflannel-udp runs here"):
        find_socket(tmp_path, None)
    with pytest.raises(Refusal, match="no pyflannel-udp runs here"):
        ask(find_socket(tmp_path, 7), "status")
    for vni in (1, 2):
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(socket_path(tmp_path, vni)))
    with pytest.raises(Refusal, match="choose with --vni"):
        find_socket(tmp_path, None)
    with pytest.raises(Refusal, match="nobody listens"):
        ask(find_socket(tmp_path, 2), "status")
