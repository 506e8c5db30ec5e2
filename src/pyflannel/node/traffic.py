"""Keeps the host's traffic rules and the blackhole route: at start, after changes, for ever.

Which rules there are is `traffic_rules`' business, how they are written `firewall`'s. Rules stay on
exit, as flannel's do.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from pyflannel.command_line.options import Options
from pyflannel.control.patience import wait_for_event
from pyflannel.dataplane.firewall import LOCK, Firewall, FirewallError, Iptables, Nftables
from pyflannel.dataplane.firewall_watch import (
    iptables_interest,
    nftables_interest,
    watch_events,
    watch_legacy,
)
from pyflannel.dataplane.netlink import Netlink
from pyflannel.dataplane.refusal import Refusal
from pyflannel.dataplane.route import IPNetwork
from pyflannel.dataplane.traffic_rules import TrafficRules, traffic_rules

log = logging.getLogger(__name__)

BRIDGE = Path("/proc/sys/net/bridge")
BRIDGE_FILES = {4: "bridge-nf-call-iptables", 6: "bridge-nf-call-ip6tables"}

# One `iptables -F` is many events; they are answered by one look.
SETTLE_SECONDS = 0.1
# Whoever undoes our repairs this often is a program, and so are we: do not fight it.
REPAIRS_MAX, REPAIRS_SECONDS = 10, 10.0

Pair = tuple[IPNetwork, IPNetwork]
"""A family's network, and our subnet in it."""


def bridge_warning(pairs: Sequence[Pair], bridge: Path = BRIDGE) -> str | None:
    """Return the sentence about a missing br_netfilter, where flannel would not start at all.

    None also where the kernel's settings are not to be seen.
    """
    if not bridge.parent.exists():
        return None
    missing = [
        bridge / BRIDGE_FILES[network.version]
        for network, _ in pairs
        if not (bridge / BRIDGE_FILES[network.version]).exists()
    ]
    if not missing:
        return None
    return (
        f"{missing[0]} is missing, so packets between two containers on one bridge bypass iptables "
        "and a Kubernetes service behind which both are may not answer; load it: "
        "modprobe br_netfilter"
    )


class Traffic:
    """The rules of every family of this node; `start` before `adopt` and `run`."""

    def __init__(
        self,
        options: Options,
        netlink: Netlink,
        stack: contextlib.ExitStack,
        *,
        nftables: bool,
        old: Sequence[Pair],
    ) -> None:
        """Prepare; `old` is what the node had when it ran the last time."""
        self._options = options
        self._netlink = netlink
        self._stack = stack
        self._nftables = nftables
        self._pairs: Sequence[Pair] = ()
        self._old = list(old)
        self._changed = asyncio.Event()
        self._repairs: deque[float] = deque(maxlen=REPAIRS_MAX)
        self._said = ""
        random = not options.ip_masq_fully_random_disable
        self._iptables = Iptables(fully_random=random)
        self._firewall: Firewall = Nftables(fully_random=random) if nftables else self._iptables

    async def start(self, pairs: Sequence[Pair]) -> None:
        """Write all rules and begin to watch them; Refusal when masquerading cannot be had.

        `pairs` are this node's networks and subnets, one of each family.
        """
        try:
            await (self._iptables if self._nftables else Nftables(fully_random=True)).remove_all()
        except FirewallError as error:
            log.warning("rules of the other kind may be left: %s", error)
        if not self._nftables and (warning := bridge_warning(pairs)):
            log.warning("%s", warning)
        self._pairs = pairs
        try:
            await self._ensure()
        except FirewallError as error:
            if self._options.ip_masq:
                raise Refusal(
                    f"--ip-masq: {error}; {self._remedy(error)}, or leave --ip-masq out"
                ) from None
            self._say(f"forward rules are missing: {error}; {self._remedy(error)}")
        await self._blackhole()
        if self._nftables:
            watch_events(nftables_interest(), self._changed.set, self._stack)
            return
        versions = [network.version for network, _ in pairs]
        with contextlib.suppress(FirewallError):
            if await self._iptables.is_legacy():
                watch_legacy(versions, self._changed.set, self._stack)
            else:
                watch_events(iptables_interest(versions), self._changed.set, self._stack)

    def _remedy(self, error: FirewallError) -> str:
        package, other = ("nftables", "false") if self._nftables else ("iptables", "true")
        first = ""
        if error.is_missing:
            first = f"install {package} or "
        elif LOCK in str(error):
            first = "run as root (systemd: DynamicUser=no and ReadWritePaths=/run) or "
        return f"{first}set EnableNFTables to {other}"

    def _say(self, sentence: str) -> None:
        """Log what is wrong; again only after it was right."""
        if not self._said:
            log.warning("%s", sentence)
        self._said = sentence

    def adopt(self, pairs: Sequence[Pair]) -> None:
        """Let `run` write the rules for these networks and subnets instead of those before."""
        self._old += [pair for pair in self._pairs if pair not in pairs]
        self._pairs = pairs
        self._changed.set()

    async def _ensure(self) -> bool:
        options = self._options
        old = [traffic_rules(*x, masquerade=True, forward=True) for x in (*self._old, *self._pairs)]
        amiss = False
        for pair in self._pairs:
            rules = traffic_rules(
                *pair, masquerade=options.ip_masq, forward=options.iptables_forward_rules
            )
            amiss |= await self._firewall.ensure(
                rules, [other for other in old if other.version == rules.version]
            )
        # A network may have lost a family. flannel makes nftables its table all the same, empty.
        others = {6} if self._nftables else {rules.version for rules in old}
        for version in others - {network.version for network, _ in self._pairs}:
            amiss |= await self._firewall.ensure(
                TrafficRules(version), [other for other in old if other.version == version]
            )
        return amiss

    async def _blackhole(self) -> None:
        if not self._options.ip_blackhole_route:
            return
        for _, subnet in self._old:
            if all(subnet != ours for _, ours in self._pairs):
                await self._netlink.remove_blackhole(subnet)
        for _, subnet in self._pairs:
            await self._netlink.ensure_blackhole(subnet)

    async def run(self) -> None:
        """Look after every change and every --iptables-resync seconds; never returns."""
        loop = asyncio.get_running_loop()
        period = self._options.iptables_resync
        while True:
            if await wait_for_event(self._changed, period):
                await asyncio.sleep(SETTLE_SECONDS)
            self._changed.clear()
            try:
                await self._blackhole()
                amiss = await self._ensure()
            except FirewallError as error:
                self._say(f"traffic rules cannot be looked after: {error}; {self._remedy(error)}")
                await asyncio.sleep(period)
                continue
            self._said = ""
            if not amiss:
                continue
            log.warning("traffic rules were changed or removed by somebody; they are back")
            self._repairs.append(loop.time())
            if (
                len(self._repairs) == REPAIRS_MAX
                and self._repairs[-1] - self._repairs[0] < REPAIRS_SECONDS
            ):
                log.error(
                    "another program removes our traffic rules again and again (a second flannel "
                    "daemon or a firewall service?); looking only every %d s",
                    period,
                )
                await asyncio.sleep(period)
