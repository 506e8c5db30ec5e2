"""subnet.env, which the CNI plugin and Docker read: written atomically, read back at start.

It knows the file's format (spec section 11) and nothing of who needs it.
"""

from __future__ import annotations

import logging
import os
import tempfile
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path

from pyflannel.control.lease import LeaseSubnet
from pyflannel.dataplane.route import IPNetwork

log = logging.getLogger(__name__)


_PREFIX = {4: "FLANNEL_", 6: "FLANNEL_IPV6_"}


@dataclass(frozen=True, slots=True)
class SubnetFile:
    """The content of subnet.env; `mtu` in bytes, of packets inside the overlay.

    `pairs` are each family's network and our subnet in it, IPv4 first.
    """

    pairs: tuple[tuple[IPNetwork, IPNetwork], ...]
    mtu: int
    ip_masq: bool

    def render(self) -> str:
        """Return the text, byte for byte as flannel writes it."""
        lines = []
        for network, subnet in self.pairs:
            prefix = _PREFIX[network.version]
            lines += [
                f"{prefix}NETWORK={network}\n",
                f"{prefix}SUBNET={subnet.network_address + 1}/{subnet.prefixlen}\n",
            ]
        lines += [
            f"FLANNEL_MTU={self.mtu}\n",
            f"FLANNEL_IPMASQ={'true' if self.ip_masq else 'false'}\n",
        ]
        return "".join(lines)


def write_atomically(path: Path, content: bytes, mode: int) -> None:
    """Replace a file so that a reader sees the old or the new text; OSError if it cannot be."""
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    fd, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(fd, "wb") as file:
            os.fchmod(fd, mode)
            file.write(content)
            file.flush()
            os.fsync(fd)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def write_subnet_file(path: Path, content: SubnetFile) -> None:
    """Write subnet.env with mode 0644 whatever the umask."""
    text = content.render().encode()
    try:
        write_atomically(path, text, 0o644)
    except OSError:
        # On a disk that is full or has become read-only it may stand there already.
        if not path.is_file() or path.read_bytes() != text:
            raise


def variables_untrusted(text: str) -> dict[str, str]:
    """Read dotenv lines: comments, quotes and `export ` are tolerated."""
    found = {}
    for line in text.splitlines():
        name, equals, value = line.strip().partition("=")
        name = name.removeprefix("export ").strip()
        if equals and not name.startswith("#"):
            found[name] = value.strip().strip("\"'")
    return found


def read_previous_networks(path: Path) -> tuple[tuple[IPNetwork, IPNetwork], ...]:
    """Return (network, own subnet) of each family of the last run; nothing where it is unreadable.

    It is `read_previous_subnet` that says so in the log.
    """
    try:
        found = variables_untrusted(path.read_text(encoding="utf-8"))
        return tuple(
            (ip_network(found[network]), ip_network(found[subnet], strict=False))
            for network, subnet in ((f"{x}NETWORK", f"{x}SUBNET") for x in _PREFIX.values())
            if network in found and subnet in found
        )
    except (OSError, ValueError):
        return ()


def read_previous_subnet(path: Path) -> LeaseSubnet | None:
    """Return the subnet of the last run, None when there is none that can be used."""
    try:
        found = variables_untrusted(path.read_text(encoding="utf-8"))
        text, text6 = found.get("FLANNEL_SUBNET", ""), found.get("FLANNEL_IPV6_SUBNET", "")
        if not text:
            return None
        return LeaseSubnet(
            IPv4Network(text, strict=False), IPv6Network(text6, strict=False) if text6 else None
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        log.warning("%s: previous subnet not used: %s", path, error)
        return None
