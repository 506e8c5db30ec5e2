"""SIGHUP: reads again what may have changed, uses what can change now, names the rest.

Verbosity comes from the options file; certificates are read for a new connection to etcd; the
network configuration is only compared, because another network means other addresses for every
container. One that has become invalid makes the node unready and changes nothing (decision 20).
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Callable

from pyflannel.command_line.options import Options, UsageError
from pyflannel.control.etcd_fault import EtcdUnavailable
from pyflannel.control.lease import config_key
from pyflannel.control.network_config import (
    NetworkConfig,
    NetworkConfigError,
    parse_network_config_untrusted,
)
from pyflannel.dataplane.refusal import Refusal
from pyflannel.management.log import set_verbosity
from pyflannel.management.notify import notify
from pyflannel.node.parts import Node

log = logging.getLogger(__name__)

CONFIG_SECONDS = 60.0
BAD_CONFIG = "network-config"
_NOT_OPTIONS = ("v", "given", "notes")


async def reload_when_told(
    node: Node, read_options: Callable[[], Options], hangup: asyncio.Event
) -> None:
    """Reload at each SIGHUP, for ever; one that came during the start waits until READY."""
    while True:
        await hangup.wait()
        hangup.clear()
        await _reload(node, read_options)


async def _reload(node: Node, read_options: Callable[[], Options]) -> None:
    notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
    said = [_reload_options(node, read_options)]
    tls = any(endpoint.startswith("https://") for endpoint in node.options.etcd_endpoints)
    if node.etcd is not None and tls:
        await node.etcd.close()
        said.append("certificates are read again, with a new connection to etcd")
    said.append(await check_config(node))
    log.info("Reloaded: %s", "; ".join(said))
    notify("READY=1")


def _reload_options(node: Node, read_options: Callable[[], Options]) -> str:
    try:
        new = read_options()
    except (UsageError, Refusal) as error:
        return f"options stay as they are: {error}"
    for note in new.notes:
        log.warning("%s", note)
    old, node.options = node.options, dataclasses.replace(node.options, v=new.v)
    set_verbosity(new.v)
    changed = [
        "--" + field.name.replace("_", "-")
        for field in dataclasses.fields(Options)
        if field.name not in _NOT_OPTIONS and getattr(old, field.name) != getattr(new, field.name)
    ]
    verbosity = f"verbosity {new.v}" + (f" instead of {old.v}" if new.v != old.v else " as before")
    if not changed:
        return verbosity
    return f"{verbosity}; {', '.join(changed)} changed and need a restart"


async def check_config(node: Node) -> str:
    """Compare the network configuration in etcd with the one in use; return a clause about it."""
    if node.etcd is None or node.config is None:
        return "the network configuration is not in use yet"
    key = config_key(node.options.etcd_prefix)
    try:
        reading = await node.etcd.get(key)
        if reading.kv is None:
            raise NetworkConfigError(f"etcd key {key} is gone")
        found = parse_network_config_untrusted(reading.kv.value)
    except EtcdUnavailable as error:
        return f"the network configuration cannot be read: {error}"
    except NetworkConfigError as error:
        node.readiness.set(BAD_CONFIG, f"{error}; the configuration from the start stays in use")
        return f"the network configuration is unusable: {error}"
    node.readiness.clear(BAD_CONFIG)
    changed = [
        field.name
        for field in dataclasses.fields(NetworkConfig)
        if getattr(found, field.name) != getattr(node.config, field.name)
    ]
    if not changed:
        return "the network configuration is as before"
    return f"the network configuration has another {', '.join(changed)}, which needs a restart"


async def follow_config(node: Node) -> None:
    """Look at the configuration now and then, so that one that went bad is told; for ever."""
    before = ""
    while True:
        await asyncio.sleep(CONFIG_SECONDS)
        clause = await check_config(node)
        if clause != before and "restart" in clause:
            log.warning("%s", clause)
        before = clause
