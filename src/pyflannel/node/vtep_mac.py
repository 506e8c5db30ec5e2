"""Finds the VTEP MAC of each overlay at start, and keeps it for the next one."""

from __future__ import annotations

import logging
import os

from pyflannel.control.lease_list import SnapshotReader
from pyflannel.control.vtep_identity import (
    find_vtep_mac,
    load_vtep_mac,
    pick_vtep_mac,
    read_machine_id,
    save_vtep_mac,
)
from pyflannel.dataplane.refusal import Refusal
from pyflannel.dataplane.route import IPAddress, MacAddress
from pyflannel.node.first_reads import until_etcd_answers
from pyflannel.node.overlay import Overlay
from pyflannel.node.parts import Node

log = logging.getLogger(__name__)


async def own_vtep_mac(
    node: Node,
    overlay: Overlay,
    kernel_mac: MacAddress | None,
    read: SnapshotReader,
    public_ip: IPAddress,
) -> MacAddress:
    """Return the MAC of an overlay: kept, of the kernel device before it, of our lease, or new.

    Our lease is that of `public_ip`. Refusal when the MAC cannot be kept.
    """
    path = node.options.state_dir / f"{overlay.device}.json"
    machine_id = read_machine_id()
    stored = load_vtep_mac(path, machine_id)
    if stored is not None and node.options.takeover:
        # The process before us has told it to the peers.
        mac, origin = pick_vtep_mac(stored, None, None, os.urandom)
    else:
        mac, origin = await until_etcd_answers(
            "the list of leases in etcd",
            node.readiness,
            lambda: find_vtep_mac(read, public_ip, overlay.version, stored, kernel_mac, os.urandom),
        )
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
