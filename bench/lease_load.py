"""Changes leases in etcd, and sees when a change is in the packets; run inside a namespace.

`churn RATE SECONDS LEASES` changes random leases of those that `Lab.add_leases` made: half get
another MAC, a quarter another address, a quarter goes and comes back at its next turn.
`probe TIMES INTERVAL` changes the MAC of one lease of its own, sends packets to its subnet from the
node's side, and takes the time from etcd's acknowledgement to the first frame on eth0 that carries
the new MAC, and to the event of a watch of that lease alone. `ttl TIMES` asks for leases' time to
live, one after the other.
Each prints one JSON object.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable
from ipaddress import IPv4Address, IPv4Network
from typing import Any

from pyflannel.control.etcd3_stubs import call, message
from pyflannel.control.lease import (
    LeaseAttributes,
    LeaseSubnet,
    Vtep,
    lease_key,
    parse_lease_attributes_untrusted,
)
from pyflannel.control.quiet_grpc import grpc
from pyflannel.dataplane.route import DEFAULT_PORT, MacAddress
from tests.lab.hosts import ETCD_PORT, LEASES_BASE, PREFIX, SWITCH_ADDRESS, UNREACHED_BASE

PROBED = LeaseSubnet(IPv4Network("10.250.0.0/24"))
OTHER_ADDRESS = 1 << 15
PACKET_SECONDS = 0.0005
PROBE_SECONDS = 5.0
IN_FLIGHT = 64
ETH_P_ALL = 3  # linux/if_ether.h; any other shows only what arrives
UDP_PORT, INNER_MAC = slice(36, 38), slice(50, 56)
"""Of a frame that encapsulates: outer Ethernet, IPv4, UDP and VXLAN headers, then the inner MAC."""


class Store:
    """The leases that are changed, in etcd."""

    def __init__(self, channel: Any) -> None:
        self._put = call(channel, "KV", "Put")
        self._delete = call(channel, "KV", "DeleteRange")
        self._watch = call(channel, "Watch", "Watch")
        self.time_to_live = call(channel, "Lease", "LeaseTimeToLive")

    async def put(self, subnet: LeaseSubnet, address: IPv4Address, mac: int) -> None:
        """Write a lease; returns when etcd has acknowledged it."""
        value = LeaseAttributes(address, None, "vxlan", Vtep(_mac(mac), 1)).to_json()
        key = lease_key(PREFIX, subnet).encode()
        await self._put(message("PutRequest")(key=key, value=value))

    async def delete(self, subnet: LeaseSubnet) -> None:
        """Delete a lease."""
        await self._delete(message("DeleteRangeRequest")(key=lease_key(PREFIX, subnet).encode()))

    async def watch(self, subnet: LeaseSubnet) -> AsyncIterator[MacAddress]:
        """Watch a lease from now on; the iterator has its MAC each time that it is put."""
        create = message("WatchCreateRequest")(key=lease_key(PREFIX, subnet).encode())
        stream = self._watch()
        await stream.write(message("WatchRequest")(create_request=create))
        assert (await stream.read()).created

        async def macs() -> AsyncIterator[MacAddress]:
            while True:
                for event in (await stream.read()).events:
                    vtep = parse_lease_attributes_untrusted(event.kv.value).vtep
                    assert vtep is not None
                    yield vtep.mac

        return macs()


def _mac(number: int) -> MacAddress:
    return MacAddress(b"\x0a" + number.to_bytes(5, "big"))


def _subnet(number: int) -> LeaseSubnet:
    return LeaseSubnet(IPv4Network((LEASES_BASE + 256 * number, 24)))


def _change(store: Store, number: int, gone: set[int], chance: random.Random) -> Awaitable[None]:
    kind = chance.randrange(4)
    if kind == 0 and number not in gone:
        gone.add(number)
        return store.delete(_subnet(number))
    gone.discard(number)
    address = UNREACHED_BASE + number + (OTHER_ADDRESS if kind == 1 else 0)
    return store.put(_subnet(number), address, chance.getrandbits(39))


async def churn(store: Store, rate: float, seconds: float, leases: int) -> dict[str, float]:
    """Change leases at a rate; the order of changes to one lease does not matter here.

    `per_second` are those that etcd has acknowledged within the time, `latest` is the longest time
    in seconds from when a change was due to its acknowledgement.
    """
    chance, gone = random.Random(1), set[int]()
    free = asyncio.Semaphore(IN_FLIGHT)
    running: list[asyncio.Future[None]] = []
    began, sent, acknowledged, latest = time.monotonic(), 0, 0, 0.0

    async def change(number: int, due: float) -> None:
        nonlocal acknowledged, latest
        async with free:
            await _change(store, number, gone, chance)
        passed = time.monotonic() - began
        acknowledged += passed <= seconds
        latest = max(latest, passed - due)

    while (passed := time.monotonic() - began) < seconds:
        while sent < passed * rate:
            running.append(asyncio.ensure_future(change(chance.randrange(leases), sent / rate)))
            sent += 1
        await asyncio.sleep(0.001)
    await asyncio.gather(*running)
    return {"changes": sent, "per_second": acknowledged / seconds, "latest": latest}


class Packets:
    """Sends packets to the probed subnet, and tells when the first with a MAC was on the wire."""

    def __init__(self) -> None:
        self._tap = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
        self._tap.bind(("eth0", ETH_P_ALL))
        self._tap.settimeout(0.1)
        self._seen: dict[bytes, float] = {}
        self._is_over = False
        self._threads = [threading.Thread(target=x) for x in (self._send, self._listen)]
        for thread in self._threads:
            thread.start()

    def _send(self) -> None:
        target = (str(PROBED.ipv4[9]), 9)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as opened:
            while not self._is_over:
                with contextlib.suppress(OSError):  # the lease has no route yet
                    opened.sendto(b"probe", target)
                time.sleep(PACKET_SECONDS)

    def _listen(self) -> None:
        while not self._is_over:
            try:
                frame = self._tap.recv(INNER_MAC.stop)
            except TimeoutError:
                continue
            if frame[UDP_PORT] == DEFAULT_PORT.to_bytes(2, "big"):
                self._seen.setdefault(frame[INNER_MAC], time.monotonic())

    def first(self, mac: int) -> float | None:
        """Return when the first frame for a VTEP was seen."""
        return self._seen.get(_mac(mac).octets)

    def close(self) -> None:
        """End."""
        self._is_over = True
        for thread in self._threads:
            thread.join()
        self._tap.close()


async def probe(store: Store, times: int, interval: float) -> dict[str, list[float]]:
    """Return the latencies of so many changes, in seconds; TimeoutError when one never comes.

    `told` are those of etcd's events alone, negative where one overtook the acknowledgement.
    """
    packets, latencies, told = Packets(), [], []
    events: dict[MacAddress, float] = {}

    async def listen(macs: AsyncIterator[MacAddress]) -> None:
        async for mac in macs:
            events.setdefault(mac, time.monotonic())

    listening = asyncio.ensure_future(listen(await store.watch(PROBED)))
    try:
        # Not those of a probe before, whose last one is on the wire still.
        first = random.randrange(1 << 20)
        for number in range(first, first + times):
            await store.put(PROBED, UNREACHED_BASE, number)
            acknowledged = time.monotonic()
            while (seen := packets.first(number)) is None or _mac(number) not in events:
                if time.monotonic() > acknowledged + PROBE_SECONDS:
                    raise TimeoutError(f"change {number} is in no packet")
                await asyncio.sleep(0.001)
            latencies.append(seen - acknowledged)
            told.append(events[_mac(number)] - acknowledged)
            await asyncio.sleep(interval * random.random() * 2)
    finally:
        listening.cancel()
        packets.close()
    return {"latencies": latencies, "told": told}


async def time_to_live(store: Store, times: int) -> dict[str, float]:
    """Ask for a time to live, one after the other, as flanneld does for each lease."""
    began = time.monotonic()
    for _ in range(times):
        await store.time_to_live(message("LeaseTimeToLiveRequest")(ID=1))
    return {"seconds": (time.monotonic() - began) / times}


async def main(words: list[str]) -> None:
    """Run one of the commands."""
    async with grpc.aio.insecure_channel(f"{SWITCH_ADDRESS}:{ETCD_PORT}") as channel:
        store, command = Store(channel), words[0]
        report: dict[str, Any]
        if command == "churn":
            report = await churn(store, float(words[1]), float(words[2]), int(words[3]))
        elif command == "probe":
            report = await probe(store, int(words[1]), float(words[2]))
        else:
            report = await time_to_live(store, int(words[1]))
        print(json.dumps(report))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
