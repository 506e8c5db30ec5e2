"""Readiness, its HTTP server, and what the service supervisor is told."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from pyflannel.dataplane.inheritance import Inheritance
from pyflannel.dataplane.refusal import Refusal
from pyflannel.management import health
from pyflannel.management.health import HealthServer, Readiness
from pyflannel.management.notify import notify


@pytest.fixture
def readiness() -> Readiness:
    return Readiness()


async def page() -> bytes:
    return b"pyflannel_ready 0.0\n"


@pytest.fixture
async def server(readiness: Readiness) -> AsyncIterator[HealthServer]:
    made = HealthServer(readiness, "127.0.0.1", 0, page)
    await made.start(Inheritance())
    yield made
    await made.close()


async def ask(server: HealthServer, request: bytes, *, half_closed: bool = False) -> bytes:
    """Send a request and read until the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(request)
    if half_closed:
        writer.write_eof()
    try:
        return await asyncio.wait_for(reader.read(), 10)
    except ConnectionResetError:
        return b""
    finally:
        writer.close()


async def get(server: HealthServer, path: str) -> tuple[int, bytes]:
    answer = await ask(server, f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    head, _, body = answer.partition(b"\r\n\r\n")
    assert f"Content-Length: {len(body)}".encode() in head
    return int(head.split()[1]), body


def test_reasons_come_and_go_and_are_told_once(
    readiness: Readiness, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    readiness.set("etcd", "etcd is gone")
    readiness.set("etcd", "etcd is gone")
    readiness.clear("starting")
    assert not readiness.is_ready
    assert dict(readiness.reasons) == {"etcd": "etcd is gone"}
    readiness.clear("etcd")
    readiness.clear("etcd")
    assert readiness.is_ready
    assert [record.getMessage() for record in caplog.records] == [
        "not ready (etcd): etcd is gone",
        "cleared: starting",
        "cleared: etcd; ready",
    ]


async def test_pages(server: HealthServer, readiness: Readiness) -> None:
    assert await get(server, "/healthz") == (200, b"pyflannel-udp is running\n")
    assert await get(server, "/readyz") == (503, b"starting: the node is starting\n")
    readiness.clear("starting")
    assert await get(server, "/readyz?verbose=1") == (200, b"pyflannel-udp is ready\n")
    assert await get(server, "/metrics") == (200, b"pyflannel_ready 0.0\n")
    status, _ = await get(server, "/")
    assert status == 404


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"POST /healthz HTTP/1.1\r\n\r\n", b"405"),
        (b"nonsense\r\n\r\n", b"400"),
        (b"\r\n\r\n", b"400"),
        (b"GET  /healthz  HTTP/1.1\r\n\r\n", b"400"),
    ],
)
async def test_other_requests_are_refused(
    server: HealthServer, request_: bytes, status: bytes
) -> None:
    assert (await ask(server, request_)).split()[1] == status


async def test_a_request_that_is_too_long_cut_short_or_slow_ends_without_an_answer(
    server: HealthServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert await ask(server, b"GET /healthz HTTP/1.1\r\nX: " + b"x" * 20_000 + b"\r\n\r\n") == b""
    assert await ask(server, b"GET /healthz", half_closed=True) == b""
    with monkeypatch.context() as patch:
        patch.setattr(health, "REQUEST_SECONDS", 0.05)
        assert await ask(server, b"GET /healthz") == b""
    assert (await get(server, "/healthz"))[0] == 200


async def test_a_port_that_is_taken_is_refused(server: HealthServer, readiness: Readiness) -> None:
    other = HealthServer(readiness, "127.0.0.1", server.port, page)
    with pytest.raises(Refusal, match=f"127.0.0.1:{server.port}.*--healthz-port"):
        await other.start(Inheritance())
    await other.close()


@pytest.mark.parametrize("abstract", [False, True])
def test_the_supervisor_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, abstract: bool
) -> None:
    name = f"@{tmp_path}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
        supervisor.bind("\0" + name[1:] if abstract else name)
        supervisor.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        notify("READY=1")
        assert supervisor.recv(100) == b"READY=1"


def test_the_supervisor_is_told_why_the_node_is_not_ready(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, readiness: Readiness
) -> None:
    name = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
        supervisor.bind(name)
        supervisor.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        readiness.clear("starting")
        assert supervisor.recv(100) == b"STATUS=ready"
        for _ in range(2):
            readiness.set("etcd", "its words:\nREADY=1")
        assert supervisor.recv(100) == b"STATUS=etcd: its words: READY=1"
        readiness.set("routes", "refused")
        assert supervisor.recv(100) == b"STATUS=etcd: its words: READY=1; routes: refused"


@pytest.mark.parametrize("name", ["", "relative", "/nowhere/notify", "@nobody", "/" + "x" * 200])
def test_no_supervisor_is_no_error(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", name)
    notify("READY=1")
    monkeypatch.delenv("NOTIFY_SOCKET")
    notify("READY=1")
