"""The JSON form of leases, the same whether a daemon or etcd told them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pyflannel.control.lease import Lease


def leases_value(found: Iterable[Lease], unused: Mapping[str, str], prefix: str) -> dict[str, Any]:
    """Return leases and the reason by key for what is not used."""
    ordered = sorted(found, key=lambda lease: lease.subnet.ipv4)
    return {
        "prefix": prefix,
        "leases": [
            {
                "key": str(lease.subnet),
                "subnet": str(lease.subnet.ipv4),
                "subnet_ipv6": _text(lease.subnet.ipv6),
                "public_ip": str(lease.attributes.public_ip),
                "public_ipv6": _text(lease.attributes.public_ipv6),
                "backend_type": lease.attributes.backend_type,
                "vtep_mac": _text(lease.attributes.vtep and lease.attributes.vtep.mac),
                "vtep_mac_ipv6": _text(lease.attributes.vtep_v6 and lease.attributes.vtep_v6.mac),
                "reservation": lease.etcd_lease == 0,
                "revision": lease.mod_revision,
            }
            for lease in ordered
        ],
        "unused": dict(unused),
    }


def _text(value: object) -> str | None:
    return None if value is None else str(value)
