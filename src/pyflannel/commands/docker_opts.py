"""`pyflannel-udp docker-opts`: from subnet.env to an environment file for the Docker daemon.

Same options and same output as flannel's mk-docker-opts.sh (spec section 11), except that a file
that is missing or wrong is refused and nothing is written, where the script writes half of it.
"""

from __future__ import annotations

import getopt
import os
import re
import sys
from collections.abc import Mapping, Sequence
from ipaddress import IPv4Interface, IPv4Network
from pathlib import Path

from pyflannel.command_line.usage import command_help
from pyflannel.control.subnet_file import variables_untrusted, write_atomically
from pyflannel.dataplane.refusal import Refusal

ROUTES = Path("/proc/net/route")
NAME_IT = "name the file that the daemon writes (--subnet-file) with -f"


def docker_options_untrusted(text: str, path: Path, *, ip_masq: bool) -> dict[str, str]:
    """Return the Docker option by variable from the text of subnet.env; Refusal if it is none."""
    found = variables_untrusted(text)
    options = {}
    if "FLANNEL_SUBNET" not in found:
        raise Refusal(f"{path} has no FLANNEL_SUBNET; {NAME_IT}")
    try:
        options["DOCKER_OPT_BIP"] = f"--bip={IPv4Interface(found['FLANNEL_SUBNET'])}"
    except ValueError:
        raise Refusal(
            f"{path}: FLANNEL_SUBNET is {found['FLANNEL_SUBNET']!r}, not a subnet such as "
            f"10.5.72.1/24; {NAME_IT}"
        ) from None
    masqueraded = found.get("FLANNEL_IPMASQ", "")
    if masqueraded not in ("true", "false", ""):
        raise Refusal(f"{path}: FLANNEL_IPMASQ is {masqueraded!r}, neither true nor false")
    if masqueraded and ip_masq:
        # What the daemon masquerades Docker must not, and the other way round.
        docker = "false" if masqueraded == "true" else "true"
        options["DOCKER_OPT_IPMASQ"] = f"--ip-masq={docker}"
    mtu = found.get("FLANNEL_MTU", "")
    if mtu and not mtu.isdecimal():
        raise Refusal(f"{path}: FLANNEL_MTU is {mtu!r}, not a number of bytes")
    if mtu:
        options["DOCKER_OPT_MTU"] = f"--mtu={mtu}"
    return options


def render(options: Mapping[str, str], *, each: bool, combined: str | None, before: str) -> str:
    """Return the environment file; `before` is the value the combined variable has already."""
    lines = [f'{name}="{value}"' for name, value in options.items()] if each else []
    if combined is not None:
        joined = "".join(f" {value}" for value in options.values())
        lines.append(f'{combined}="{before + " " if before else ""}{joined}"')
    return "".join(f"{line}\n" for line in lines)


def gateway_of(subnet: IPv4Network, routes: str) -> str | None:
    """Return the interface behind which a gateway leads to the subnet, from /proc/net/route."""
    for line in routes.splitlines()[1:]:
        interface, destination, gateway, *_, mask, _, _, _ = line.split()
        route = tuple(int(x, 16).to_bytes(4, sys.byteorder) for x in (destination, mask))
        wanted = (subnet.network_address.packed, subnet.netmask.packed)
        if route == wanted and int(gateway, 16):
            return interface
    return None


def main(argv: Sequence[str]) -> int:
    """Run the sub-command; Refusal when the files are not what they should be."""
    try:
        pairs, rest = getopt.getopt(list(argv), "f:d:icmk:h", ["help"])
    except getopt.GetoptError as error:
        print(f"pyflannel-udp docker-opts: {error}; see docker-opts -h", file=sys.stderr)
        return 2
    if rest:
        print(f"pyflannel-udp docker-opts: {rest[0]!r} is not an option", file=sys.stderr)
        return 2
    given = dict(pairs)
    if given.keys() & {"-h", "--help"}:
        print(command_help("docker-opts"))
        return 0
    source = Path(given.get("-f", "/run/flannel/subnet.env"))
    target = Path(given.get("-d", "/run/docker_opts.env"))
    name = given.get("-k", "DOCKER_OPTS")
    if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name):
        raise Refusal(f"-k {name!r} is not the name of a variable")
    try:
        text = source.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise Refusal(f"{source} is not there; start the daemon first, or {NAME_IT}") from None
    except UnicodeDecodeError:
        raise Refusal(f"{source} is no text; {NAME_IT}") from None
    except PermissionError:
        raise Refusal(f"{source}: may not be read; run the command as root") from None
    except OSError as error:
        raise Refusal(f"{source} cannot be read ({error.strerror}); {NAME_IT}") from None
    options = docker_options_untrusted(text, source, ip_masq="-m" not in given)
    subnet = IPv4Interface(options["DOCKER_OPT_BIP"].removeprefix("--bip=")).network
    interface = gateway_of(subnet, ROUTES.read_text())
    if interface is not None:
        raise Refusal(
            f"this host already routes {subnet} to a gateway on {interface}, so Docker cannot have "
            f"it; remove that route: ip route del {subnet}"
        )
    both = not given.keys() & {"-i", "-c"}
    content = render(
        options,
        each=both or "-i" in given,
        combined=name if both or "-c" in given else None,
        before=os.environ.get(name, ""),
    )
    try:
        write_atomically(target, content.encode(), 0o644)
    except OSError as error:
        raise Refusal(
            f"{target} cannot be written ({error.strerror}); choose another with -d"
        ) from None
    return 0
