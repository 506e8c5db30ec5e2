"""The rules are flanneld's: compared with what iptables-save and nft printed on a host of flanneld.

And `restore_input` mends any chain in one step, checked on a model of iptables-restore.
"""

from __future__ import annotations

import random
from ipaddress import ip_network
from pathlib import Path

import pytest

from pyflannel.dataplane.traffic_rules import (
    CHAINS,
    FORWARD,
    MASQUERADE,
    Chain,
    TrafficRules,
    iptables_rules,
    nft_input,
    restore_input,
    traffic_rules,
)

DATA = Path(__file__).parent / "data"
CASES = [
    ("flannel-iptables-save.txt", "10.244.0.0/16", "10.244.35.0/24"),
    ("flannel-ip6tables-save.txt", "2001:db8:42::/56", "2001:db8:42:3a::/64"),
]


def _rules(network: str, subnet: str) -> TrafficRules:
    return traffic_rules(ip_network(network), ip_network(subnet), masquerade=True, forward=True)


def _table(saved: str, name: str) -> str:
    return saved.split(f"*{name}\n")[1].split("COMMIT\n")[0]


@pytest.mark.parametrize(("file", "network", "subnet"), CASES)
@pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: chain.table)
def test_iptables_rules_are_flannels(file: str, network: str, subnet: str, chain: Chain) -> None:
    lines = _table((DATA / file).read_text(), chain.table).splitlines()
    ours = iptables_rules(_rules(network, subnet), chain, fully_random=True)
    assert [x for x in lines if x.startswith("-A")] == [
        f"-A {chain.hook} {chain.jump}",
        *(f"-A {chain.name} {x}" for x in ours),
    ]


def test_nft_rules_are_flannels_but_for_rule_4() -> None:
    theirs = (DATA / "flannel-nft-list-ruleset.txt").read_text()
    wrong = "ip saddr != 10.244.27.0/24 ip daddr 10.244.0.0/16 return"
    assert theirs.count(wrong) == 1
    expected = theirs.replace(wrong, "ip saddr != 10.244.0.0/16 ip daddr 10.244.27.0/24 return")
    ours = nft_input(_rules("10.244.0.0/16", "10.244.27.0/24"), fully_random=True) + nft_input(
        TrafficRules(6), fully_random=True
    )
    statements = [x for x in ours.splitlines() if not x.startswith(("add", "delete"))]
    assert _statements("\n".join(statements)) == _statements(expected)


def _statements(text: str) -> list[str]:
    lines = (part.strip() for line in text.splitlines() for part in line.split(";"))
    return [line for line in lines if line]


def test_flags_leave_rules_out() -> None:
    networks = ip_network("10.244.0.0/16"), ip_network("10.244.35.0/24")
    neither = traffic_rules(*networks, masquerade=False, forward=False)
    assert neither == TrafficRules(4)
    text = nft_input(_rules("10.244.0.0/16", "10.244.35.0/24"), fully_random=False)
    assert "fully-random" not in text
    assert all(
        "--random-fully" not in rule
        for rule in iptables_rules(
            _rules("10.244.0.0/16", "10.244.35.0/24"), MASQUERADE, fully_random=False
        )
    )


class _Model:
    """One table of iptables, as iptables-restore --noflush changes and iptables-save prints it."""

    def __init__(self, chain: Chain, hook: list[str], ours: list[str] | None) -> None:
        self.chain = chain
        self.chains = {chain.hook: list(hook)}
        if ours is not None:
            self.chains[chain.name] = list(ours)

    def save(self) -> str:
        lines = [f"*{self.chain.table}", *(f":{name} - [0:0]" for name in self.chains)]
        lines += [f"-A {name} {rule}" for name, rules in self.chains.items() for rule in rules]
        return "\n".join((*lines, "COMMIT", ""))

    def restore(self, text: str) -> None:
        head, *lines, commit = text.splitlines()
        assert (head, commit) == (f"*{self.chain.table}", "COMMIT")
        for line in lines:
            if line.startswith(":"):
                self.chains[line[1:].split()[0]] = []
                continue
            flag, name, *rule = line.split(" ", 2)
            if flag == "-A":
                self.chains[name] += rule
            elif flag == "-D":
                self.chains[name].remove(rule[0])
            else:
                assert flag == "-X"
                assert not self.chains[name]
                assert all(f"-j {name}" not in x for x in self.chains[self.chain.hook])
                del self.chains[name]


@pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: chain.table)
def test_any_state_is_mended_in_one_step_and_others_rules_stay(chain: Chain) -> None:
    dice = random.Random(7)
    wanted = iptables_rules(_rules("10.244.0.0/16", "10.244.35.0/24"), chain, fully_random=True)
    old = iptables_rules(_rules("10.244.0.0/16", "10.244.9.0/24"), chain, fully_random=True)
    second = iptables_rules(_rules("10.9.0.0/16", "10.9.1.0/24"), chain, fully_random=True)
    foreign = ["-j DOCKER", '-m comment --comment "kube" -j KUBE']
    for _ in range(500):
        hook = dice.choices([*foreign, chain.jump], k=dice.randrange(5))
        ours = dice.choices([*wanted, *old, *second], k=dice.randrange(12))
        model = _Model(chain, hook, dice.choice([ours, list(wanted), None]))
        if chain.name not in model.chains:
            model.chains[chain.hook] = [x for x in hook if x != chain.jump]
        before = [x for x in model.chains.get(chain.name, []) if x not in {*wanted, *old}]
        text = restore_input(model.save(), chain, wanted, set(old))
        if text is not None:
            model.restore(text)
        after = model.chains[chain.name]
        assert [x for x in after if x in wanted] == list(wanted)
        assert [x for x in after if x not in wanted] == before
        assert model.chains[chain.hook].count(chain.jump) == 1
        assert [x for x in model.chains[chain.hook] if x != chain.jump] == [
            x for x in hook if x != chain.jump
        ]
        assert restore_input(model.save(), chain, wanted, set(old)) is None


def test_two_daemons_with_two_networks_agree() -> None:
    model = _Model(MASQUERADE, [], None)
    pairs = [("10.244.0.0/16", "10.244.35.0/24"), ("10.9.0.0/16", "10.9.1.0/24")]
    both = [iptables_rules(_rules(*pair), MASQUERADE, fully_random=True) for pair in pairs]
    for wanted in both:
        text = restore_input(model.save(), MASQUERADE, wanted, set())
        assert text is not None
        model.restore(text)
    for wanted in both:
        assert restore_input(model.save(), MASQUERADE, wanted, set()) is None


def test_everything_is_removed_where_no_rules_are_wanted() -> None:
    wanted = iptables_rules(_rules("10.244.0.0/16", "10.244.35.0/24"), FORWARD, fully_random=True)
    model = _Model(FORWARD, ["-j DOCKER", FORWARD.jump, FORWARD.jump], list(wanted))
    text = restore_input(model.save(), FORWARD, (), None)
    assert text is not None
    model.restore(text)
    assert model.chains == {"FORWARD": ["-j DOCKER"]}
    assert restore_input(model.save(), FORWARD, (), None) is None
