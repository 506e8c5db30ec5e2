"""The parts of a running node, for those who show it: status, metrics, health.

It holds and decides nothing; the daemon fills it while it starts.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from pyflannel.command_line.options import Options
from pyflannel.control.etcd import Etcd
from pyflannel.control.lease_keeper import LeaseKeeper
from pyflannel.control.lease_table import LeaseTable
from pyflannel.control.network_config import NetworkConfig
from pyflannel.control.route_sync import RouteSync
from pyflannel.dataplane.netlink import Netlink
from pyflannel.management.health import Readiness
from pyflannel.node.overlay import Overlay


@dataclass(slots=True)
class Node:
    """What is up already; None or empty before. `started` is of the monotonic clock."""

    options: Options
    readiness: Readiness = field(default_factory=Readiness)
    started: float = field(default_factory=time.monotonic)
    etcd: Etcd | None = None
    config: NetworkConfig | None = None
    netlink: Netlink | None = None
    overlays: list[Overlay] = field(default_factory=list)
    keeper: LeaseKeeper | None = None
    table: LeaseTable | None = None
    sync: RouteSync | None = None
