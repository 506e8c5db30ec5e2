"""The VTEP MAC of this host: chosen once, kept across restarts.

Peers know the MAC from etcd and the kernel's devices check it, so it must not change with every
start. The file is bound to the machine-id: a cloned disk does not clone the MAC.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

from pyflannel.control.subnet_file import write_atomically
from pyflannel.dataplane.route import MacAddress

log = logging.getLogger(__name__)


def load_vtep_mac(path: Path, machine_id: str) -> MacAddress | None:
    """Return the MAC kept in `path` by this machine, None if there is none to use."""
    try:
        state = json.loads(path.read_bytes())
        if state["machine_id"] != machine_id:
            log.warning("%s was written on another machine: its VTEP MAC is not used", path)
            return None
        mac = MacAddress.parse(state["vtep_mac"])
        if mac.is_vtep:
            return mac
        log.warning("%s: %s cannot be a VTEP's MAC", path, mac)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s: VTEP MAC not used: %s", path, error)
    return None


def save_vtep_mac(path: Path, machine_id: str, mac: MacAddress) -> None:
    """Keep the MAC; OSError if the file cannot be written."""
    state = {"machine_id": machine_id, "vtep_mac": str(mac)}
    write_atomically(path, json.dumps(state).encode() + b"\n", 0o600)


def pick_vtep_mac(
    stored: MacAddress | None,
    kernel_device: MacAddress | None,
    lease: MacAddress | None,
    randbytes: Callable[[int], bytes],
) -> tuple[MacAddress, str]:
    """Return the MAC to use and where it comes from: the first known, else a random one."""
    for mac, origin in (
        (stored, "kept from the last start"),
        (kernel_device, "of the kernel device before us"),
        (lease, "from our lease in etcd"),
    ):
        if mac is not None and mac.is_vtep:
            return mac, origin
    return MacAddress.random(randbytes), "new"
