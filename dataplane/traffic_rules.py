"""Which firewall rules flannel wants for a network and its own subnet, and how each tool says them.

Pure: no program is run. The rules are flannel's (spec sections 12, 13), so that a host may change
between flanneld and us; decision 23 names the one nftables rule that differs.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from ipaddress import ip_network

from pyflannel.dataplane.route import IPNetwork

# What kube-proxy has marked for masquerading, it masquerades.
KUBE_PROXY_MARK = 0x4000
MULTICAST = {4: ip_network("224.0.0.0/4"), 6: ip_network("ff00::/8")}


@dataclass(frozen=True, slots=True)
class Match:
    """Addresses inside a network, or outside it."""

    network: IPNetwork
    inside: bool = True


@dataclass(frozen=True, slots=True)
class Rule:
    """What to do (`return`, `accept`, `masquerade`) with packets that fulfil all that is given."""

    verdict: str
    source: Match | None = None
    destination: Match | None = None
    mark: int | None = None


@dataclass(frozen=True, slots=True)
class TrafficRules:
    """The rules of one address family, in order; an empty tuple means no such rules."""

    version: int
    masquerade: tuple[Rule, ...] = ()
    forward: tuple[Rule, ...] = ()


def traffic_rules(
    network: IPNetwork, subnet: IPNetwork, *, masquerade: bool, forward: bool
) -> TrafficRules:
    """Return the rules of one family."""
    everywhere, ours = Match(network), Match(subnet)
    masquerading = (
        Rule("return", mark=KUBE_PROXY_MARK),
        Rule("return", ours, everywhere),
        Rule("return", everywhere, ours),
        Rule("return", Match(network, inside=False), ours),
        Rule("masquerade", everywhere, Match(MULTICAST[network.version], inside=False)),
        Rule("masquerade", Match(network, inside=False), everywhere),
    )
    forwarding = (Rule("accept", source=everywhere), Rule("accept", destination=everywhere))
    return TrafficRules(
        network.version,
        masquerading if masquerade else (),
        forwarding if forward else (),
    )


@dataclass(frozen=True, slots=True)
class Chain:
    """A chain of ours in iptables, and the built-in chain that jumps to it."""

    table: str
    name: str
    hook: str
    comment: str

    @property
    def jump(self) -> str:
        """The rule in the built-in chain, as iptables-save prints it."""
        return f'-m comment --comment "{self.comment}" -j {self.name}'

    def rule(self, rule: Rule, *, fully_random: bool) -> str:
        """Return a rule as iptables-save prints it, without `-A` and chain."""
        words = []
        if rule.mark is not None:
            words.append(f"-m mark --mark {rule.mark:#x}/{rule.mark:#x}")
        for flag, match in (("-s", rule.source), ("-d", rule.destination)):
            if match is not None:
                words.append(f"{'' if match.inside else '! '}{flag} {match.network}")
        words.append(f'-m comment --comment "{self.comment}" -j {rule.verdict.upper()}')
        if rule.verdict == "masquerade" and fully_random:
            words.append("--random-fully")
        return " ".join(words)


MASQUERADE = Chain("nat", "FLANNEL-POSTRTG", "POSTROUTING", "flanneld masq")
FORWARD = Chain("filter", "FLANNEL-FWD", "FORWARD", "flanneld forward")
CHAINS = (FORWARD, MASQUERADE)


def iptables_rules(rules: TrafficRules, chain: Chain, *, fully_random: bool) -> tuple[str, ...]:
    """Return the content of one chain."""
    of_chain = rules.masquerade if chain is MASQUERADE else rules.forward
    return tuple(chain.rule(rule, fully_random=fully_random) for rule in of_chain)


def restore_input(
    saved: str, chain: Chain, wanted: Sequence[str], old: Collection[str] | None
) -> str | None:
    """Return what `iptables-restore --noflush` needs to make a chain right, None if it is.

    `saved` is what iptables-save prints for the table. Rules in `old` go, all others when it is
    None; further ones in our chain stay behind ours, because a second daemon for another network
    uses the same chain.
    """
    exists = False
    present: list[str] = []
    jumps = 0
    for line in saved.splitlines():
        if line.startswith(f":{chain.name} "):
            exists = True
        elif line.startswith(f"-A {chain.name} "):
            present.append(line.removeprefix(f"-A {chain.name} "))
        elif line == f"-A {chain.hook} {chain.jump}":
            jumps += 1
    kept = [x for x in present if old is not None and x not in wanted and x not in old]
    if not wanted and not kept:
        if not exists:
            return None
        return _restore(chain, jumps, [f":{chain.name} - [0:0]"], [f"-X {chain.name}"])
    stale = any(x not in kept and x not in wanted for x in present)
    if [x for x in present if x in wanted] == list(wanted) and not stale and jumps == 1:
        return None
    # A chain that is named is emptied, in the same transaction that fills it again.
    filled = [f":{chain.name} - [0:0]", *(f"-A {chain.name} {x}" for x in (*wanted, *kept))]
    if jumps == 1:
        return _restore(chain, 0, filled, [])
    return _restore(chain, jumps, filled, [f"-A {chain.hook} {chain.jump}"])


def _restore(chain: Chain, jumps: int, first: Sequence[str], then: Sequence[str]) -> str:
    unjump = [f"-D {chain.hook} {chain.jump}"] * jumps
    return "\n".join((f"*{chain.table}", *first, *unjump, *then, "COMMIT", ""))


NFT_FAMILY = {4: "ip", 6: "ip6"}


def nft_table(version: int) -> str:
    """Return family and name of our table, such as `ip flannel-ipv4`."""
    return f"{NFT_FAMILY[version]} flannel-ipv{version}"


def nft_input(rules: TrafficRules, *, fully_random: bool) -> str:
    """Return what `nft -f -` needs to make our table of one family anew, in one transaction."""
    table = nft_table(rules.version)
    made = nft_statements(rules, fully_random=fully_random)
    return "\n".join((f"add table {table}", f"delete table {table}", *made, ""))


def nft_statements(rules: TrafficRules, *, fully_random: bool) -> list[str]:
    """Return our table line by line, as `nft list table` prints it but for the indentation."""
    table = nft_table(rules.version)
    lines = [f"table {table} {{", f'comment "rules for {table.split()[1]}"']
    for name, kind, comment, of_chain in (
        (
            "postrtg",
            "type nat hook postrouting priority srcnat",
            "chain to manage traffic masquerading by flannel",
            rules.masquerade,
        ),
        (
            "forward",
            "type filter hook forward priority filter",
            "chain to accept flannel traffic",
            rules.forward,
        ),
    ):
        if of_chain:
            lines += [f"chain {name} {{", f'comment "{comment}"', f"{kind}; policy accept;"]
            lines += [_nft_rule(rule, rules.version, fully_random) for rule in of_chain]
            lines.append("}")
    return [*lines, "}"]


def _nft_rule(rule: Rule, version: int, fully_random: bool) -> str:
    words = []
    if rule.mark is not None:
        words.append(f"meta mark {rule.mark:#010x}")
    for field, match in (("saddr", rule.source), ("daddr", rule.destination)):
        if match is not None:
            negation = "" if match.inside else "!= "
            words.append(f"{NFT_FAMILY[version]} {field} {negation}{match.network}")
    words.append(rule.verdict)
    if rule.verdict == "masquerade" and fully_random:
        words.append("fully-random")
    return " ".join(words)
