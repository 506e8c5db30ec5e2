"""What a start reads from etcd, however long that takes; the node is not ready and says why."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from pyflannel.command_line.options import Options
from pyflannel.control.etcd import Etcd
from pyflannel.control.etcd_fault import EtcdRejected, EtcdUnavailable
from pyflannel.control.lease import config_key
from pyflannel.control.network_config import NetworkConfig, parse_network_config_untrusted
from pyflannel.dataplane.netlink import Netlink
from pyflannel.management.health import Readiness
from pyflannel.node.underlying import foresee_refusal

log = logging.getLogger(__name__)

RETRY_SECONDS = 1.0
REMIND_EVERY = 60

T = TypeVar("T")


async def until_etcd_answers(
    what: str, readiness: Readiness, attempt: Callable[[], Awaitable[T | None]]
) -> T:
    """Repeat a read until it gives something; log why not at once and then every minute."""
    failures = 0
    while True:
        why = "is not there yet"
        try:
            found = await attempt()
            if found is not None:
                readiness.start()
                return found
        except EtcdRejected as error:
            why = f"cannot be read: {error}"
        except EtcdUnavailable as error:
            readiness.start(f"etcd does not answer: {error}")
            continue  # the session logs, and makes the next attempt wait
        readiness.start(f"{what} {why}")
        if failures % REMIND_EVERY == 0:
            log.warning("%s %s; trying again every %.0f s", what, why, RETRY_SECONDS)
        failures += 1
        await asyncio.sleep(RETRY_SECONDS)


async def read_config(
    etcd: Etcd, netlink: Netlink, options: Options, readiness: Readiness
) -> NetworkConfig:
    """Return the network's configuration as soon as it is there; NetworkConfigError if it is bad.

    Meanwhile the log tells what of the host will be refused later.
    """
    key = config_key(options.etcd_prefix)

    async def read() -> bytes | None:
        reading = await etcd.get(key)
        return reading.kv.value if reading.kv is not None else None

    async def tell_meanwhile() -> None:
        await asyncio.sleep(RETRY_SECONDS)
        await foresee_refusal(options, netlink, "the start")

    telling = asyncio.ensure_future(tell_meanwhile())
    try:
        text = await until_etcd_answers(f"etcd key {key}", readiness, read)
    finally:
        telling.cancel()
    config = parse_network_config_untrusted(text)
    backend = config.backend
    if backend.learning:
        log.warning("Learning is ignored: peers are known from etcd, so there is nothing to learn")
    log.info("Found network config - Backend type: vxlan")
    log.info(
        "VXLAN config: VNI=%d Port=%d GBP=false Learning=%s DirectRouting=%s",
        backend.vni,
        backend.port,
        str(backend.learning).lower(),
        str(backend.direct_routing).lower(),
    )
    return config
