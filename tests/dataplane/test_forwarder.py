"""A forwarder that the host lets have no thread leaves nothing behind."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from contextlib import ExitStack
from ipaddress import IPv4Network

import pytest

from pyflannel.dataplane.fastpath import Context, FastpathConfig, Worker, WorkerIo
from pyflannel.dataplane.forwarder import Forwarder, Workers
from pyflannel.dataplane.refusal import Refusal
from pyflannel.dataplane.route import MacAddress, Vni


@pytest.mark.parametrize(("number", "raised"), [(errno.EAGAIN, Refusal), (errno.ENOMEM, OSError)])
def test_a_start_without_threads_can_be_tried_again(
    monkeypatch: pytest.MonkeyPatch, number: int, raised: type[Exception]
) -> None:
    def refuse(worker: Worker, threads: int) -> None:
        raise OSError(number, os.strerror(number))

    async def try_twice(forwarder: Forwarder, io: WorkerIo) -> None:
        open_before = os.listdir("/proc/self/fd")
        for _ in range(2):
            with pytest.raises(raised):
                forwarder.start(io)
            assert os.listdir("/proc/self/fd") == open_before
            assert not forwarder.is_running
        monkeypatch.undo()
        forwarder.start(io)
        assert forwarder.is_running
        forwarder.close()

    monkeypatch.setattr(Worker, "start", refuse)
    with ExitStack() as closing:
        tun = closing.enter_context(socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)[0])
        udp = closing.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        for one in (tun, udp):
            one.setblocking(False)
        udp.bind(("127.0.0.1", 0))
        mac = MacAddress.parse("02:00:00:00:00:01")
        context = Context(FastpathConfig(Vni(1), mac, IPv4Network("10.5.0.0/16")))
        io = WorkerIo((tun.fileno(),), tun.fileno(), (udp.fileno(),), (udp.fileno(),))
        asyncio.run(try_twice(Forwarder(context, Workers.AUTO, lambda error: None), io))
        context.close()
