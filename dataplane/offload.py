"""Which work the kernel takes off us, per direction; a leaf that asks nobody.

`auto` is every one that a probe finds; a list forces exactly these.
"""

from __future__ import annotations

from enum import Flag, auto


class Offload(Flag):
    """One offload each; named as ethtool names the like of a network card."""

    TSO = auto()
    """The TUN hands over and takes TCP super-packets (TUNSETOFFLOAD)."""
    USO = auto()
    """The same for UDP; Linux 6.2."""
    GSO = auto()
    """A send carries many datagrams (UDP_SEGMENT); Linux 4.18."""
    GRO = auto()
    """A receive brings many datagrams (UDP_GRO); Linux 5.0."""

    def __str__(self) -> str:
        names = [member.name.lower() for member in Offload if member in self and member.name]
        return ",".join(names) or "off"


NO_OFFLOAD = Offload(0)
TUN_OFFLOADS = Offload.TSO | Offload.USO
EVERY_OFFLOAD = Offload.TSO | Offload.USO | Offload.GSO | Offload.GRO


def parse_offload(text: str) -> Offload | None:
    """Read `auto` (None), `off`, or names separated by commas; ValueError otherwise."""
    if text == "auto":
        return None
    chosen = NO_OFFLOAD
    for name in text.split(",") if text != "off" else ():
        try:
            chosen |= Offload[name.strip().upper()]
        except KeyError:
            names = ", ".join(str(member) for member in Offload)
            raise ValueError(f"must be auto, off or a list of {names}") from None
    return chosen
