"""Writes traffic rules with the host's own tools and finds out whether they are still there.

Two appliers behind one interface, for iptables and nftables. They do not know when to look:
`firewall_watch` does. Source: spec sections 12 and 13, decision 23.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence

from pyflannel.dataplane.traffic_rules import (
    CHAINS,
    NFT_FAMILY,
    Chain,
    TrafficRules,
    iptables_rules,
    nft_input,
    nft_statements,
    nft_table,
    restore_input,
)

log = logging.getLogger(__name__)

LOCK = "/run/xtables.lock"
LOCK_SECONDS = "5"
TOOL_SECONDS = 20.0


class FirewallError(Exception):
    """A tool refused or, if `is_missing`, is not there; `str()` is a clause that names it."""

    def __init__(self, clause: str, *, is_missing: bool = False) -> None:
        super().__init__(clause)
        self.is_missing = is_missing


async def _run(*command: str, text: str = "") -> str:
    """Run a program on a text; return what it prints, FirewallError if it fails."""
    program = shutil.which(command[0])
    if program is None:
        raise FirewallError(f"{command[0]} is not installed", is_missing=True)
    # In a thread and not by the event loop, whose fork() makes gRPC log a line for each program.
    try:
        done = await asyncio.to_thread(
            subprocess.run,
            [program, *command[1:]],
            input=text.encode(),
            capture_output=True,
            timeout=TOOL_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise FirewallError(str(error)) from None
    if done.returncode:
        said = " ".join(done.stderr.decode(errors="replace").split())
        raise FirewallError(f"{' '.join(command)}: {said or f'exit code {done.returncode}'}")
    return done.stdout.decode(errors="replace")


class Firewall(ABC):
    """What writes rules."""

    def __init__(self, *, fully_random: bool) -> None:
        self._fully_random = fully_random
        self._has_written = False

    async def ensure(self, rules: TrafficRules, old: Collection[TrafficRules]) -> bool:
        """Make the rules of a family so, without `old` ones; return whether anything was amiss.

        FirewallError when a tool is missing or refuses.
        """
        try:
            amiss = await self._write(rules, old, self._fully_random)
        except FirewallError as error:
            # Only the first time: later on it is not the option that is to blame.
            if self._has_written or not self._fully_random or not rules.masquerade:
                raise
            try:
                amiss = await self._write(rules, old, False)
            except FirewallError:
                raise error from None
            log.warning("masquerading without fully random ports, which are refused: %s", error)
            self._fully_random = False
        self._has_written = True
        return amiss

    @abstractmethod
    async def _write(
        self, rules: TrafficRules, old: Collection[TrafficRules], fully_random: bool
    ) -> bool: ...

    @abstractmethod
    async def remove_all(self) -> None:
        """Remove what any daemon of flannel's kind left; a tool that is missing left nothing."""


class Iptables(Firewall):
    """iptables and ip6tables of the flavour the host has; rules of others are not touched."""

    async def is_legacy(self) -> bool:
        """Whether the host's iptables speaks to the kernel's old interface, not to nf_tables."""
        return "nf_tables" not in await _run("iptables", "--version")

    async def _write(
        self, rules: TrafficRules, old: Collection[TrafficRules], fully_random: bool
    ) -> bool:
        amiss = False
        for chain in CHAINS:
            unwanted = {
                text
                for other in old
                for either in (False, True)
                for text in iptables_rules(other, chain, fully_random=either)
            }
            wanted = iptables_rules(rules, chain, fully_random=fully_random)
            amiss |= await self._make(rules.version, chain, wanted, unwanted)
        return amiss

    async def _make(
        self, version: int, chain: Chain, wanted: Sequence[str], old: Collection[str] | None
    ) -> bool:
        program = _iptables(version)
        saved = await _run(f"{program}-save", "-t", chain.table)
        text = restore_input(saved, chain, wanted, old)
        if text is None:
            return False
        await _run(f"{program}-restore", "--noflush", "-w", LOCK_SECONDS, text=text)
        return True

    async def remove_all(self) -> None:
        """Remove our chains from both families."""
        for version in NFT_FAMILY:
            if shutil.which(_iptables(version)) is not None:
                for chain in CHAINS:
                    await self._make(version, chain, (), None)


class Nftables(Firewall):
    """nft with tables of our own, one of each family; each is rewritten as a whole."""

    def __init__(self, *, fully_random: bool) -> None:
        super().__init__(fully_random=fully_random)
        self._as_printed: dict[TrafficRules, list[str]] = {}

    async def _write(
        self, rules: TrafficRules, old: Collection[TrafficRules], fully_random: bool
    ) -> bool:
        wanted = nft_statements(rules, fully_random=fully_random)
        try:
            if await _list_table(rules.version) in (wanted, self._as_printed.get(rules)):
                return False
        except FirewallError:
            log.debug("there is no table %s", nft_table(rules.version))
        await _run("nft", "-f", "-", text=nft_input(rules, fully_random=fully_random))
        # Another version of nft may print them differently. Fewer or more lines are somebody's who
        # was quicker than our look.
        printed = await _list_table(rules.version)
        if len(printed) == len(wanted):
            self._as_printed[rules] = printed
        return True

    async def remove_all(self) -> None:
        """Remove our tables of both families."""
        if shutil.which("nft") is None:
            return
        for version in NFT_FAMILY:
            table = nft_table(version)
            await _run("nft", "-f", "-", text=f"add table {table}\ndelete table {table}\n")


async def _list_table(version: int) -> list[str]:
    printed = await _run("nft", "list", "table", *nft_table(version).split())
    return [line.strip() for line in printed.splitlines() if line.strip()]


def _iptables(version: int) -> str:
    return "iptables" if version == 4 else "ip6tables"
