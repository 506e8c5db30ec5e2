"""The life of our own lease as a table, and what is shown of it.

Does no I/O. `judge` says what a reading of our key means, TRANSITIONS what follows from it. The
keeper reads, looks up and does the action. Source: spec section 5, decisions 14, 15, 17.

What our key shows (Sighting)
  OURS      as we wrote it
  REWOUND   ours, but from before our last write: the store went back
  RESERVED  ours without an etcd lease: a reservation, never renewed
  BARE      a reservation of our public IP that lacks our MAC
  COPIED    our very value, put by somebody else
  TWIN      our very value, put by somebody else again and again
  FOREIGN   put by somebody else, with another MAC or again and again
  TAKEN     deleted, and created by a host with another public IP
  GONE      there is no key

            HELD                RESERVED            LOST                CONTESTED
 OURS       HELD     adopt      RESERVED nothing    HELD     adopt      CONTESTED nothing
 REWOUND    HELD     rewrite    RESERVED rewrite    HELD     rewrite    HELD     rewrite
 RESERVED   RESERVED adopt      RESERVED rewrite    RESERVED adopt      RESERVED adopt
 BARE       RESERVED rewrite    RESERVED rewrite    RESERVED rewrite    RESERVED rewrite
 COPIED     HELD     rewrite    HELD     rewrite    HELD     rewrite    HELD     rewrite
 TWIN       CONTESTED protest   CONTESTED protest   CONTESTED protest   CONTESTED protest
 FOREIGN    CONTESTED report    CONTESTED report    CONTESTED report    CONTESTED report
 TAKEN      LOST     acquire    LOST     acquire    LOST     acquire    LOST     acquire
 GONE       LOST     create     LOST     create     LOST     create     LOST     create

A host that writes what we write is there, if it is, to answer each put of ours with one of its own:
so a copy is written over, and a twin, which has answered, is told a few times more that we are here
and have seen it (protest). Whoever sees either does the same, until both have reported the other.

SEEKING is the time before the first lease, RELEASED that after it was given back or left to a
successor; no key is judged in either.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from enum import Enum
from ipaddress import IPv4Address, IPv6Address

from pyflannel.control.lease import (
    LEASE_TTL_SECONDS,
    BadLease,
    KeyValue,
    Lease,
    LeaseSubnet,
    parse_lease_attributes_untrusted,
)
from pyflannel.dataplane.route import MacAddress

RENEW_JITTER = 0.05
"""Share of the time until renewal by which it may come earlier, so that a cluster spreads out."""

COPIES_TOLERATED = 2
"""Foreign puts of our own value that are written over before they count as a second writer."""


class LeaseState(Enum):
    """Where our lease stands."""

    SEEKING = "seeking"
    HELD = "held"
    RESERVED = "reserved"
    LOST = "lost"
    CONTESTED = "contested"
    RELEASED = "released"


class Sighting(Enum):
    """What a reading of our key means."""

    OURS = "ours"
    REWOUND = "rewound"
    RESERVED = "reserved"
    BARE = "bare"
    COPIED = "copied"
    TWIN = "twin"
    FOREIGN = "foreign"
    TAKEN = "taken"
    GONE = "gone"


class Action(Enum):
    """What the keeper does about a sighting."""

    NOTHING = "nothing"
    ADOPT = "adopt"
    REWRITE = "rewrite"
    REPORT = "report"
    PROTEST = "protest"
    CREATE = "create"
    ACQUIRE = "acquire"


_L, _S, _A = LeaseState, Sighting, Action
WITH_KEY = (_L.HELD, _L.RESERVED, _L.LOST, _L.CONTESTED)
TRANSITIONS: dict[tuple[LeaseState, Sighting], tuple[LeaseState, Action]] = {
    **{(state, _S.OURS): (_L.HELD, _A.ADOPT) for state in WITH_KEY},
    **{(state, _S.REWOUND): (_L.HELD, _A.REWRITE) for state in WITH_KEY},
    **{(state, _S.RESERVED): (_L.RESERVED, _A.ADOPT) for state in WITH_KEY},
    **{(state, _S.BARE): (_L.RESERVED, _A.REWRITE) for state in WITH_KEY},
    **{(state, _S.COPIED): (_L.HELD, _A.REWRITE) for state in WITH_KEY},
    **{(state, _S.TWIN): (_L.CONTESTED, _A.PROTEST) for state in WITH_KEY},
    **{(state, _S.FOREIGN): (_L.CONTESTED, _A.REPORT) for state in WITH_KEY},
    **{(state, _S.TAKEN): (_L.LOST, _A.ACQUIRE) for state in WITH_KEY},
    **{(state, _S.GONE): (_L.LOST, _A.CREATE) for state in WITH_KEY},
    (_L.RESERVED, _S.OURS): (_L.RESERVED, _A.NOTHING),
    (_L.RESERVED, _S.REWOUND): (_L.RESERVED, _A.REWRITE),
    (_L.RESERVED, _S.RESERVED): (_L.RESERVED, _A.REWRITE),
    (_L.CONTESTED, _S.OURS): (_L.CONTESTED, _A.NOTHING),
}


@dataclass(frozen=True, slots=True)
class OwnLease:
    """A reading of our lease for health, status and metrics.

    `expires_at` is wall clock in seconds, None for a reservation or without a lease.
    """

    state: LeaseState
    subnet: LeaseSubnet | None = None
    public_ip: IPv4Address | None = None
    vtep_mac: MacAddress | None = None
    public_ipv6: IPv6Address | None = None
    vtep_mac_v6: MacAddress | None = None
    etcd_lease: int = 0
    expires_at: float | None = None
    renewals: int = 0
    losses: int = 0
    foreign_puts: int = 0

    @property
    def is_reservation(self) -> bool:
        """Whether it has no etcd lease and so never ends."""
        return self.state is LeaseState.RESERVED


def judge(
    own: Lease, value: bytes, granted: Container[int], kv: KeyValue | None, foreign_puts: int
) -> Sighting:
    """Say what a reading of our key means.

    `own` is our last write or what we adopted, `value` what we write next, `granted` the etcd
    leases that we made. `foreign_puts` counts the foreign puts seen before this one.
    """
    if kv is None:
        return Sighting.GONE
    if (kv.mod_revision, kv.lease) == (own.mod_revision, own.etcd_lease):
        return Sighting.OURS
    if kv.value == value and kv.lease in granted:
        return Sighting.OURS
    try:
        theirs = parse_lease_attributes_untrusted(kv.value)
    except BadLease:
        return Sighting.FOREIGN
    ours = own.attributes
    if theirs.public_ip != ours.public_ip:
        replaced = kv.create_revision != own.create_revision
        return Sighting.TAKEN if replaced else Sighting.FOREIGN
    if kv.mod_revision < own.mod_revision:
        return Sighting.REWOUND
    if theirs.vtep is not None and ours.vtep is not None and theirs.vtep.mac != ours.vtep.mac:
        return Sighting.FOREIGN
    if foreign_puts >= COPIES_TOLERATED:
        return Sighting.TWIN if kv.value == value else Sighting.FOREIGN
    if kv.lease == 0:
        return Sighting.RESERVED if kv.value == value else Sighting.BARE
    return Sighting.COPIED if kv.value == value else Sighting.FOREIGN


def seconds_to_renewal(ends_at: float, now: float, margin: float, chance: float) -> float:
    """Return how long to wait before renewing; `chance` in 0..1 spreads it.

    All times in seconds of a clock that counts a suspension, so that a host renews when it wakes,
    and that nobody sets: one set back by more than the margin would have the lease end first.
    """
    whole = max(LEASE_TTL_SECONDS - margin, 0.0)
    return ends_at - margin - whole * RENEW_JITTER * chance - now
