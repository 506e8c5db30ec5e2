"""The VTEP MAC of this host: chosen once, kept across restarts.

Peers know the MAC from etcd and the kernel's devices check it, so it must not change with every
start. The file is bound to the machine-id: a cloned disk does not clone the MAC. Where that id was
cloned as well, or there is none, the leases in etcd tell that another host has the MAC.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from pyflannel.control.lease import Lease
from pyflannel.control.lease_list import SnapshotReader, read_leases_of, read_leases_with
from pyflannel.control.subnet_file import write_atomically
from pyflannel.dataplane.route import IPAddress, MacAddress

log = logging.getLogger(__name__)

MACHINE_ID = Path("/etc/machine-id")


def read_machine_id(path: Path = MACHINE_ID) -> str:
    """Return what tells this machine from others, "" where there is nothing that can be read."""
    try:
        return path.read_text().strip()
    except (OSError, ValueError):
        return ""


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


async def find_vtep_mac(
    read: SnapshotReader,
    public_ip: IPAddress,
    version: int,
    stored: MacAddress | None,
    kernel_device: MacAddress | None,
    randbytes: Callable[[int], bytes],
) -> tuple[MacAddress, str]:
    """Return the MAC as `pick_vtep_mac` does, but none that another host's lease tells.

    Our lease is that of `public_ip`. EtcdUnavailable.
    """
    own = _lease_mac(await read_leases_of(read, public_ip), version)
    mac, origin = pick_vtep_mac(stored, kernel_device, own, randbytes)
    for lease in await read_leases_with(read, mac, version):
        if lease.attributes.public_ip != public_ip:
            log.warning(
                "VTEP MAC %s, %s, is that of lease %s at %s too, so a new one is taken: this disk "
                "is a copy of that host's, or this host had that address",
                mac,
                origin,
                lease.subnet,
                lease.attributes.public_ip,
            )
            return pick_vtep_mac(None, None, None, randbytes)
    return mac, origin


def _lease_mac(leases: Sequence[Lease], version: int) -> MacAddress | None:
    """Return the first VTEP MAC of a family."""
    for lease in leases:
        part = lease.part(version)
        if part is not None and part.vtep is not None:
            return part.vtep.mac
    return None
