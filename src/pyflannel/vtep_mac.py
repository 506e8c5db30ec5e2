"""Finds the VTEP MAC of each overlay at start, and keeps it for the next one."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from pyflannel.control.lease import Lease
from pyflannel.control.lease_list import SnapshotReader, read_leases_of
from pyflannel.control.vtep_identity import load_vtep_mac, pick_vtep_mac, save_vtep_mac
from pyflannel.dataplane.refusal import Refusal
from pyflannel.dataplane.route import IPAddress, MacAddress
from pyflannel.first_reads import until_etcd_answers
from pyflannel.node import Node
from pyflannel.overlay import Overlay

log = logging.getLogger(__name__)

MACHINE_ID = Path("/etc/machine-id")


async def own_vtep_mac(
    node: Node,
    overlay: Overlay,
    kernel_mac: MacAddress | None,
    read: SnapshotReader,
    public_ip: IPAddress,
) -> MacAddress:
    """Return the MAC of an overlay: kept, of the kernel device before it, of our lease, or new.

    etcd is read only for that lease, the one of `public_ip`. Refusal when the MAC cannot be kept.
    """
    path = node.options.state_dir / f"{overlay.device}.json"
    machine_id = MACHINE_ID.read_text().strip() if MACHINE_ID.exists() else ""
    stored, lease_mac = load_vtep_mac(path, machine_id), None
    if stored is None and kernel_mac is None:
        own = await until_etcd_answers(
            "the list of leases in etcd", node.readiness, lambda: read_leases_of(read, public_ip)
        )
        lease_mac = _mac_of(own, overlay.version)
    mac, origin = pick_vtep_mac(stored, kernel_mac, lease_mac, os.urandom)
    try:
        # A disk that is full or has become read-only keeps nobody from what stands there.
        if mac != stored:
            save_vtep_mac(path, machine_id, mac)
    except OSError as error:
        raise Refusal(
            f"{path}: cannot keep the VTEP MAC ({error.strerror}); "
            "make the folder writable or choose another with --state-dir"
        ) from error
    log.info("VTEP MAC of %s: %s (%s)", overlay.device, mac, origin)
    return mac


def _mac_of(leases: Sequence[Lease], version: int) -> MacAddress | None:
    """Return the first VTEP MAC of a family."""
    for lease in leases:
        part = lease.part(version)
        if part is not None and part.vtep is not None:
            return part.vtep.mac
    return None
