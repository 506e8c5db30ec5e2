"""What our key can show, and what follows from it: exhaustively."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyflannel.control import own_lease
from pyflannel.control.lease import (
    KeyValue,
    Lease,
    LeaseAttributes,
    LeaseSubnet,
    Vtep,
    parse_lease_attributes_untrusted,
)
from pyflannel.control.own_lease import (
    TRANSITIONS,
    WITH_KEY,
    Action,
    LeaseState,
    Sighting,
    judge,
    seconds_to_renewal,
)
from pyflannel.dataplane.route import MacAddress

SUBNET = LeaseSubnet(IPv4Network("10.5.1.0/24"))
KEY = b"/coreos.com/network/subnets/10.5.1.0-24"


def value(ip: str = "192.0.2.1", mac: int = 1) -> bytes:
    vtep = Vtep(MacAddress(b"\x02\0\0\0\0" + bytes([mac])), 1)
    return LeaseAttributes(IPv4Address(ip), None, "vxlan", vtep).to_json()


OURS = value()
OWN = Lease(SUBNET, parse_lease_attributes_untrusted(OURS), 40, 50, 7)
RESERVATION = replace(OWN, etcd_lease=0)
OUR_WRITE = (Sighting.OURS, Sighting.REWOUND)
BARE = b'{"PublicIP":"192.0.2.1"}'


def kv(octets: bytes = OURS, created: int = 40, modified: int = 50, lease: int = 7) -> KeyValue:
    return KeyValue(KEY, octets, created, modified, 1, lease)


@pytest.mark.parametrize(
    ("own", "seen", "puts", "sighting"),
    [
        (OWN, None, 0, Sighting.GONE),
        (OWN, kv(), 0, Sighting.OURS),
        (OWN, kv(), 99, Sighting.OURS),
        (OWN, kv(modified=60, lease=8), 0, Sighting.OURS),  # a renewal whose answer was lost
        (RESERVATION, kv(lease=0), 9, Sighting.OURS),
        (OWN, kv(modified=45, lease=3), 0, Sighting.REWOUND),
        (OWN, kv(value(mac=9), modified=45, lease=3), 0, Sighting.REWOUND),
        (OWN, kv(modified=60, lease=0), 0, Sighting.RESERVED),
        (OWN, kv(modified=60, lease=0), 2, Sighting.TWIN),
        (OWN, kv(BARE, modified=60, lease=0), 0, Sighting.BARE),
        (OWN, kv(BARE, modified=60, lease=5), 0, Sighting.FOREIGN),
        (OWN, kv(modified=60, lease=99), 1, Sighting.COPIED),
        (OWN, kv(modified=60, lease=99), 2, Sighting.TWIN),
        (OWN, kv(BARE, modified=60, lease=0), 2, Sighting.FOREIGN),
        (OWN, kv(value(mac=9), modified=60, lease=99), 0, Sighting.FOREIGN),
        (OWN, kv(value("192.0.2.9", 9), modified=60, lease=99), 0, Sighting.FOREIGN),
        (OWN, kv(value("192.0.2.9", 9), 60, 60, 99), 0, Sighting.TAKEN),
        (OWN, kv(value(mac=9), 60, 60, 99), 0, Sighting.FOREIGN),
        (OWN, kv(b"{bad", modified=60), 0, Sighting.FOREIGN),
    ],
)
def test_what_the_key_shows(
    own: Lease, seen: KeyValue | None, puts: int, sighting: Sighting
) -> None:
    assert judge(own, OURS, (7, 8), seen, puts) is sighting


@given(
    octets=st.one_of(st.binary(max_size=200), st.sampled_from([OURS, BARE, value(mac=9)])),
    revisions=st.tuples(st.integers(1, 99), st.integers(1, 99), st.integers(0, 9)),
    puts=st.integers(0, 3),
)
def test_anything_can_be_judged(octets: bytes, revisions: tuple[int, int, int], puts: int) -> None:
    assert judge(OWN, OURS, (7,), kv(octets, *revisions), puts) in Sighting


def test_the_drawing_is_the_table() -> None:
    drawn = {}
    for name, cells in re.findall(r"^ ([A-Z]+) +(.*)$", own_lease.__doc__ or "", re.MULTILINE):
        words = cells.split()
        if name in Sighting.__members__ and len(words) == 2 * len(WITH_KEY):
            for state, following, action in zip(WITH_KEY, words[::2], words[1::2]):
                drawn[state, Sighting[name]] = (LeaseState[following], Action(action))
    assert drawn == TRANSITIONS
    assert set(TRANSITIONS) == set(itertools.product(WITH_KEY, Sighting))


def test_the_state_says_what_the_key_said() -> None:
    """The next state depends on the key alone, but reservation and conflict outlast our write."""
    for sighting in Sighting:
        following = {TRANSITIONS[state, sighting][0] for state in WITH_KEY}
        lasting = {LeaseState.RESERVED, LeaseState.CONTESTED} if sighting in OUR_WRITE else set()
        assert len(following - lasting) == 1


@given(margin=st.floats(60, 86340), chance=st.floats(0, 1), age=st.floats(0, 100_000))
def test_renewal_is_early_and_never_at_once(margin: float, chance: float, age: float) -> None:
    granted = 1_000_000.0
    wait = seconds_to_renewal(granted + 86400, granted, margin, chance)
    assert 0.95 * (86400 - margin) - 1e-3 <= wait <= 86400 - margin + 1e-3
    later = seconds_to_renewal(granted + 86400, granted + age, margin, chance)
    assert abs(later - (wait - age)) < 1e-3
