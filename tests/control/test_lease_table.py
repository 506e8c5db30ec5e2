"""Snapshots and events to route changes: spec sections 6 and 19, decisions 10 to 17."""

from __future__ import annotations

import logging
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyflannel.control import lease_table
from pyflannel.control.family_routes import FamilyRoutes, Place
from pyflannel.control.lease import KeyValue, LeaseAttributes, LeaseSubnet, Vtep
from pyflannel.control.lease_table import LeaseTable
from pyflannel.dataplane.route import Delete, MacAddress, Replace, Route, RouteChange

OWN_IP = IPv4Address("192.0.2.1")
OWN_SUBNET = LeaseSubnet(IPv4Network("10.5.1.0/24"))
NETWORK = IPv4Network("10.5.0.0/16")
SUBNETS = b"/coreos.com/network/subnets/"


def value(ip: str = "192.0.2.2", mac: int = 2) -> bytes:
    vtep = Vtep(MacAddress(b"\x02\0\0\0\0" + bytes([mac])), 1)
    return LeaseAttributes(IPv4Address(ip), None, "vxlan", vtep).to_json()


def kv(key: str, octets: bytes, revision: int = 1, created: int | None = None) -> KeyValue:
    return KeyValue(SUBNETS + key.encode(), octets, created or revision, revision, 1, 5)


def route(subnet: str, ip: str = "192.0.2.2", mac: int = 2, previous: int | None = None) -> Route:
    def address(last: int) -> MacAddress:
        return MacAddress(b"\x02\0\0\0\0" + bytes([last]))

    return Route(
        IPv4Network(subnet),
        address(mac),
        IPv4Address(ip),
        8472,
        None if previous is None else address(previous),
    )


def empty_table() -> LeaseTable:
    made = LeaseTable([Place(NETWORK, OWN_IP)], 8472)
    made.set_own_subnet(OWN_SUBNET)
    return made


@pytest.fixture
def table() -> LeaseTable:
    return empty_table()


def test_a_lease_comes_is_renewed_moves_and_goes(table: LeaseTable) -> None:
    added = table.put(kv("10.5.2.0-24", value()))
    assert added == (Replace(route("10.5.2.0/24")),)
    assert table.put(kv("10.5.2.0-24", value(), 2, 1)) == ()
    moved = table.put(kv("10.5.2.0-24", value("192.0.2.9"), 3, 1))
    assert moved == (Replace(route("10.5.2.0/24", "192.0.2.9")),)
    remacced = table.put(kv("10.5.2.0-24", value("192.0.2.9", 7), 4, 1))
    assert remacced == (Replace(route("10.5.2.0/24", "192.0.2.9", 7, previous=2)),)
    assert table.delete(SUBNETS + b"10.5.2.0-24") == (Delete(IPv4Network("10.5.2.0/24")),)
    assert table.delete(SUBNETS + b"10.5.2.0-24") == ()
    assert table.routes() == ()


def test_a_snapshot_is_compared_by_value(table: LeaseTable) -> None:
    table.reset([kv("10.5.2.0-24", value()), kv("10.5.3.0-24", value("192.0.2.3", 3))])
    changes = table.reset([kv("10.5.3.0-24", value("192.0.2.4", 3)), kv("10.5.4.0-24", value())])
    assert set(changes) == {
        Delete(IPv4Network("10.5.2.0/24")),
        Replace(route("10.5.3.0/24", "192.0.2.4", 3)),
        Replace(route("10.5.4.0/24")),
    }
    same = [kv("10.5.3.0-24", value("192.0.2.4", 3)), kv("10.5.4.0-24", value())]
    assert table.reset(same) == ()


def test_another_history_removes_nobody_for_a_day(table: LeaseTable) -> None:
    table.reset([kv("10.5.2.0-24", value())])
    assert table.reset([], same_history=False, now=100) == ()
    assert table.reset([]) == ()
    assert table.unconfirmed() == {(SUBNETS + b"10.5.2.0-24").decode(): 100 + 86400}
    assert table.reset([], same_history=False, now=5000) == ()
    assert table.expire(86499) == ()
    assert table.expire(86500) == (Delete(IPv4Network("10.5.2.0/24")),)
    assert table.unconfirmed() == {}


def test_an_unconfirmed_peer_is_confirmed_by_a_put_or_a_snapshot(table: LeaseTable) -> None:
    peers = [kv("10.5.2.0-24", value(), 50), kv("10.5.3.0-24", value("192.0.2.3", 3), 60)]
    table.reset(peers)
    table.reset([], same_history=False)
    assert table.put(kv("10.5.2.0-24", value(), 5)) == ()
    assert table.reset([kv("10.5.2.0-24", value(), 5), kv("10.5.3.0-24", peers[1].value, 6)]) == ()
    assert table.unconfirmed() == {}
    assert table.expire(1e9) == ()
    assert table.delete(SUBNETS + b"10.5.2.0-24") == (Delete(IPv4Network("10.5.2.0/24")),)
    assert table.reset([]) == (Delete(IPv4Network("10.5.3.0/24")),)


def test_an_unconfirmed_peer_gives_way_to_a_lease_that_overlaps_it(table: LeaseTable) -> None:
    table.reset([kv("10.5.2.0-24", value(), 5)])
    table.reset([], same_history=False)
    changes = table.put(kv("10.5.2.0-25", value("192.0.2.8", 8), 70))
    assert set(changes) == {
        Delete(IPv4Network("10.5.2.0/24")),
        Replace(route("10.5.2.0/25", "192.0.2.8", 8)),
    }
    assert table.unconfirmed() == {}
    assert table.quarantined() == {}


def test_a_successor_keeps_what_etcd_does_not_tell_it(table: LeaseTable) -> None:
    """One peer that a wiped store does not name, one with a bad value; what came back is newer."""
    names = ("10.5.2.0-24", "10.5.3.0-24", "10.5.4.0-24", "10.5.5.0-24")
    old = [kv(name, value(f"192.0.2.{x}", x), x) for x, name in enumerate(names, 2)]
    table.reset(old)
    table.reset([], same_history=False, now=100.0)
    table.put(kv("10.5.3.0-24", b"{bad", 9))
    handed = table.beyond_etcd(200.0)
    assert {entry.key: seconds for entry, seconds in handed} == {
        SUBNETS + b"10.5.2.0-24": lease_table.UNCONFIRMED_SECONDS - 100,
        SUBNETS + b"10.5.3.0-24": None,
        SUBNETS + b"10.5.4.0-24": lease_table.UNCONFIRMED_SECONDS - 100,
        SUBNETS + b"10.5.5.0-24": lease_table.UNCONFIRMED_SECONDS - 100,
    }

    successor = empty_table()
    successor.reset(
        [
            kv("10.5.3.0-24", b"{bad", 9),
            kv("10.5.4.0-24", value("192.0.2.44", 44), 10),
            kv("10.5.5.0-25", value("192.0.2.55", 55), 11),
        ]
    )
    changes = successor.keep(handed, 1000.0)
    assert set(changes) == {
        Replace(route("10.5.2.0/24", "192.0.2.2", 2)),
        Replace(route("10.5.3.0/24", "192.0.2.3", 3)),
    }
    assert {route.underlay for route in successor.routes()} == {
        IPv4Address(f"192.0.2.{x}") for x in (2, 3, 44, 55)
    }
    ends = {SUBNETS.decode() + "10.5.2.0-24": 900.0 + lease_table.UNCONFIRMED_SECONDS}
    assert successor.unconfirmed() == ends
    assert successor.expire(901.0 + lease_table.UNCONFIRMED_SECONDS) == (
        Delete(IPv4Network("10.5.2.0/24")),
    )
    assert successor.keep([(kv("nonsense", b"", 1), 1.0)], 0.0) == ()


def test_the_own_lease_is_excluded_twice_over(table: LeaseTable) -> None:
    own = kv("10.5.1.0-24", value(str(OWN_IP), 1))
    assert table.reset([own]) == ()
    assert table.reset([own]) == ()
    assert table.quarantined() == {}


@pytest.mark.parametrize(
    ("key", "octets"),
    [
        ("foo", b"bar"),
        ("10.5.9.0-24", b"{bad"),
        ("10.5.9.0-24", b"{}"),
        ("10.5.9.0-24", b'{"PublicIP":"192.0.2.9","BackendType":"host-gw"}'),
        ("10.5.9.0-24", value().replace(b"02:00:00:00:00:02", b"")),
        ("10.5.1.0-24&fd00:9::-64", value()),
        ("10.5.2.128-25", value("192.0.2.9", 9)),
        ("10.5.0.0-17", value("192.0.2.9", 9)),
        ("10.5.9.0-24", value(str(OWN_IP), 9)),
        ("10.5.9.0-24", value("10.5.9.1", 9)),
        ("10.5.9.0-24", value("0.0.0.0", 9)),
        ("10.5.9.0-24", value("127.0.0.1", 9)),
        ("10.5.9.0-24", value("224.0.0.1", 9)),
        ("10.6.9.0-24", value("192.0.2.9", 9)),
    ],
)
def test_a_bad_neighbour_changes_nothing(table: LeaseTable, key: str, octets: bytes) -> None:
    table.put(kv("10.5.2.0-24", value(), 1))
    assert table.put(kv(key, octets, 50)) == ()
    assert table.routes() == (route("10.5.2.0/24"),)
    assert table.reset([kv("10.5.2.0-24", value(), 1), kv(key, octets, 50)]) == ()
    assert table.delete(SUBNETS + key.encode()) == ()
    assert table.routes() == (route("10.5.2.0/24"),)
    assert table.bad() == {}
    assert table.quarantined() == {}


def test_a_value_that_turns_bad_keeps_the_route_and_is_said_once(
    table: LeaseTable, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    table.put(kv("10.5.2.0-24", value()))
    assert table.put(kv("10.5.2.0-24", b"{bad", 2, 1)) == ()
    assert table.put(kv("10.5.2.0-24", b"{bad", 3, 1)) == ()
    assert table.routes() == (route("10.5.2.0/24"),)
    assert list(table.bad()) == [(SUBNETS + b"10.5.2.0-24").decode()]
    assert len(caplog.records) == 1


def test_what_is_said_of_a_hostile_key_is_one_short_line(
    table: LeaseTable, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    table.put(kv("foo\nE1128 00:00:00.000000 1 fake.py:1] forged\x1b[2J", value()))
    table.put(kv("x" * 100_000, value()))
    table.put(kv("10.5.9.0-24", value().replace(b"vxlan", b"x" * 100_000)))
    assert len(caplog.messages) == 3
    for line in caplog.messages:
        assert line.isprintable()
        assert len(line) < 500
    assert "foo" + r"\nE1128 00:00:00.000000 1 fake.py:1] forged\x1b[2J" in caplog.messages[0]


def test_the_older_of_two_overlapping_leases_wins_until_it_goes(table: LeaseTable) -> None:
    table.put(kv("10.5.2.0-25", value("192.0.2.8", 8), 20))
    changes = table.reset(
        [kv("10.5.2.0-25", value("192.0.2.8", 8), 20), kv("10.5.2.0-24", value(), 10)]
    )
    assert set(changes) == {
        Delete(IPv4Network("10.5.2.0/25")),
        Replace(route("10.5.2.0/24")),
    }
    assert "overlaps" in table.quarantined()[(SUBNETS + b"10.5.2.0-25").decode()]
    assert set(table.delete(SUBNETS + b"10.5.2.0-24")) == {
        Delete(IPv4Network("10.5.2.0/24")),
        Replace(route("10.5.2.0/25", "192.0.2.8", 8)),
    }


def test_a_lease_with_our_own_mac_is_not_used_until_it_has_another() -> None:
    table = LeaseTable([Place(NETWORK, OWN_IP, MacAddress(b"\x02\0\0\0\0\2"))], 8472)
    table.set_own_subnet(OWN_SUBNET)
    assert table.put(kv("10.5.2.0-24", value())) == ()
    assert "VTEP MAC 02:00:00:00:00:02 is our own" in next(iter(table.quarantined().values()))
    changes = table.put(kv("10.5.2.0-24", value(mac=3), 2, created=1))
    assert changes == (Replace(route("10.5.2.0/24", mac=3, previous=2)),)
    assert table.put(kv("10.5.2.0-24", value(), 3, created=1)) == (
        Delete(IPv4Network("10.5.2.0/24")),
    )


def test_a_dual_stack_key_gives_its_ipv4_part(table: LeaseTable) -> None:
    assert table.put(kv("10.5.2.0-24&fd00:2::-64", dual())) == (Replace(route("10.5.2.0/24")),)
    assert table.delete(SUBNETS + b"10.5.2.0-24&fd00:2::-64") == (
        Delete(IPv4Network("10.5.2.0/24")),
    )


def dual(ip: str = "192.0.2.2", ipv6: str | None = "2001:db8::2", mac: int = 2) -> bytes:
    vtep, vtep_v6 = (Vtep(MacAddress(bytes([2, last, 0, 0, 0, mac])), 1) for last in (0, 6))
    address = None if ipv6 is None else IPv6Address(ipv6)
    return LeaseAttributes(IPv4Address(ip), address, "vxlan", vtep, vtep_v6).to_json()


def route_v6(subnet: str, ip: str = "2001:db8::2", mac: int = 2) -> Route:
    octets = bytes([2, 6, 0, 0, 0, mac])
    return Route(IPv6Network(subnet), MacAddress(octets), IPv6Address(ip), 8472)


def dual_table() -> LeaseTable:
    ipv6 = Place(IPv6Network("fd00::/32"), IPv6Address("2001:db8::1"))
    made = LeaseTable([Place(NETWORK, OWN_IP), ipv6], 8472)
    made.set_own_subnet(LeaseSubnet(OWN_SUBNET.ipv4, IPv6Network("fd00:0:1::/64")))
    return made


@pytest.fixture
def both() -> LeaseTable:
    return dual_table()


def test_a_dual_stack_lease_comes_moves_and_goes(both: LeaseTable) -> None:
    key = "10.5.2.0-24&fd00:0:2::-64"
    added = both.put(kv(key, dual()))
    assert added == (Replace(route("10.5.2.0/24")), Replace(route_v6("fd00:0:2::/64")))
    assert both.put(kv(key, dual(), 2, 1)) == ()
    moved = both.put(kv(key, dual(ipv6="2001:db8::9"), 3, 1))
    assert moved == (Replace(route_v6("fd00:0:2::/64", "2001:db8::9")),)
    assert both.put(kv(key, dual(ipv6=None), 4, 1)) == (Delete(IPv6Network("fd00:0:2::/64")),)
    assert both.put(kv(key, dual(), 5, 1)) == (Replace(route_v6("fd00:0:2::/64")),)
    assert both.delete(SUBNETS + key.encode()) == (
        Delete(IPv4Network("10.5.2.0/24")),
        Delete(IPv6Network("fd00:0:2::/64")),
    )
    assert both.put(kv("10.5.3.0-24", value())) == (Replace(route("10.5.3.0/24")),)


@pytest.mark.parametrize(
    ("key", "octets", "why"),
    [
        ("10.5.9.0-24&fd00:0:2::-80", dual("192.0.2.9"), "overlaps"),
        ("10.5.9.0-24&fd00:0:1::-64", dual("192.0.2.9"), "our own"),
        ("10.5.9.0-24&fd01::-64", dual("192.0.2.9"), "not inside"),
        ("10.5.9.0-24&fd00:0:9::-64", dual("192.0.2.9", "2001:db8::1"), "is our own"),
        ("10.5.9.0-24&fd00:0:9::-64", dual("192.0.2.9", "fd00::7"), "inside the overlay"),
        ("10.5.9.0-24&fd00:0:9::-64", dual("192.0.2.9", "ff02::1"), "cannot be a host's"),
    ],
)
def test_a_conflict_in_ipv6_leaves_ipv4_alone(
    both: LeaseTable, key: str, octets: bytes, why: str
) -> None:
    first = "10.5.2.0-24&fd00:0:2::-64"
    both.put(kv(first, dual()))
    assert both.put(kv(key, octets, 50)) == (Replace(route("10.5.9.0/24", "192.0.2.9")),)
    assert why in both.quarantined()[(SUBNETS + key.encode()).decode()]
    assert both.reset([kv(first, dual()), kv(key, octets, 50)]) == ()
    assert both.delete(SUBNETS + key.encode()) == (Delete(IPv4Network("10.5.9.0/24")),)
    assert both.quarantined() == {}
    assert set(both.routes()) == {route("10.5.2.0/24"), route_v6("fd00:0:2::/64")}


def test_an_unconfirmed_lease_yields_in_both_families(both: LeaseTable) -> None:
    key = "10.5.2.0-24&fd00:0:2::-64"
    both.reset([kv(key, dual())])
    both.reset([], same_history=False)
    changes = both.put(kv("10.5.9.0-24&fd00:0:2::-64", dual("192.0.2.9", "2001:db8::9"), 2))
    assert Delete(IPv4Network("10.5.2.0/24")) in changes
    assert set(both.routes()) == {
        route("10.5.9.0/24", "192.0.2.9"),
        route_v6("fd00:0:2::/64", "2001:db8::9"),
    }


def test_leases_that_are_not_used_cost_the_others_nothing(
    table: LeaseTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Among 10,000 leases to derive all routes anew for each event would be 0.1 s for each."""
    table.reset(
        [
            kv("10.5.2.0-24", value()),
            kv("10.5.3.0-24", value("192.0.2.3", 3)),
            kv("10.5.3.0-25", value("192.0.2.4", 4), 2),
            kv("10.5.4.0-24", value(str(OWN_IP), 5)),
            kv("10.5.5.0-24", value("192.0.2.5", 5).replace(b"vxlan", b"host-gw")),
        ]
    )
    assert len(table.quarantined()) == 3

    def settle(*_: object) -> None:
        raise AssertionError("all routes are derived anew")

    monkeypatch.setattr(FamilyRoutes, "settle", settle)
    assert table.put(kv("10.5.6.0-24", value("192.0.2.6", 6), 7))
    assert table.put(kv("10.5.6.0-25", value("192.0.2.9", 9), 9)) == ()
    assert "older lease" in table.quarantined()[f"{SUBNETS.decode()}10.5.6.0-25"]
    assert table.put(kv("10.5.2.0-24", value("192.0.2.7"), 8, 1))
    assert table.delete(SUBNETS + b"10.5.2.0-24") == (Delete(IPv4Network("10.5.2.0/24")),)
    with pytest.raises(AssertionError, match="anew"):
        table.delete(SUBNETS + b"10.5.3.0-24")


_KEYS = st.sampled_from(
    [
        "10.5.2.0-24",
        "10.5.3.0-24&fd00:0:2::-64",
        "10.5.2.0-25&fd00:0:2::-64",
        "10.5.0.0-22",
        "10.5.1.0-24&fd00:0:9::-64",
        "10.5.4.0-24&fd00::-40",
        "foo",
    ]
)
_VALUES = st.sampled_from(
    [
        value(),
        value("10.5.7.7", 5),
        dual("192.0.2.3", "2001:db8::3", 3),
        dual(str(OWN_IP), mac=4),
        dual("192.0.2.6", "fd00::1", 6),
        dual("192.0.2.7", None, 7),
        value("192.0.2.8", 8).replace(b"vxlan", b"host-gw"),
        b"{bad",
        b"{}",
    ]
)


@given(
    entries=st.dictionaries(_KEYS, st.tuples(_VALUES, st.integers(1, 9))),
    part=st.integers(1, 3),
    events=st.lists(st.tuples(_KEYS, _VALUES, st.booleans()), max_size=10),
)
def test_a_first_snapshot_in_parts_takes_no_route_back_and_ends_as_a_whole_one(
    entries: dict[str, tuple[bytes, int]], part: int, events: list[tuple[str, bytes, bool]]
) -> None:
    kvs = [kv(key, octets, created) for key, (octets, created) in entries.items()]
    table, whole = dual_table(), dual_table()
    programmed: list[Route] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lease_table, "PART_LEASES", part)
        for changes in table.load(kvs):
            for change in changes:
                assert isinstance(change, Replace)
                programmed.append(change.route)
    whole.reset(kvs)
    assert len(programmed) == len({route.subnet for route in programmed})
    assert set(programmed) == set(table.routes()) == set(whole.routes())
    assert (table.quarantined(), table.bad()) == (whole.quarantined(), whole.bad())
    for revision, (key, octets, deleted) in enumerate(events, 10):
        for one in (table, whole):
            if deleted:
                one.delete(SUBNETS + key.encode())
            else:
                one.put(kv(key, octets, revision))
        assert set(table.routes()) == set(whole.routes())
        assert table.quarantined() == whole.quarantined()


def test_conflicts_that_come_at_once_are_settled_once(
    table: LeaseTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Among 10,000 leases, 170 at once would stop us for longer than the watchdog waits."""
    table.reset([kv(f"10.5.{x}.0-24", value(f"192.0.2.{x}", x), x) for x in range(2, 100)])
    before, settled, settle = table.routes(), 0, FamilyRoutes.settle

    def count(*arguments: Any) -> tuple[RouteChange, ...]:
        nonlocal settled
        settled += 1
        return settle(*arguments)

    monkeypatch.setattr(FamilyRoutes, "settle", count)
    rivals = [kv(f"10.5.{x}.0-25", value("192.0.2.200", 200), 200) for x in range(2, 100)]
    assert table.take([(x.key, x) for x in rivals]) == ()
    assert table.routes() == before
    assert len(table.quarantined()) == 98
    assert table.take([(x.key, None) for x in rivals]) == ()
    assert table.quarantined() == {}
    assert settled == 2


@given(
    events=st.lists(st.tuples(_KEYS, _VALUES, st.booleans()), max_size=30),
    at_once=st.integers(1, 10),
)
def test_events_lead_where_a_snapshot_would(
    events: list[tuple[str, bytes, bool]], at_once: int
) -> None:
    """The changes of any history, applied in order, give the routes; and a fresh table agrees."""
    table = dual_table()
    store: dict[str, KeyValue] = {}
    programmed: dict[object, Route] = {}
    happened: list[tuple[bytes, KeyValue | None]] = []
    for revision, (key, octets, deleted) in enumerate(events, 1):
        if deleted:
            store.pop(key, None)
        else:
            created = store[key].create_revision if key in store else revision
            store[key] = kv(key, octets, revision, created)
        happened.append((SUBNETS + key.encode(), store.get(key)))
    for start in range(0, len(happened), at_once):
        for change in table.take(happened[start : start + at_once]):
            if isinstance(change, Replace):
                programmed[change.route.subnet] = change.route
            else:
                del programmed[change.subnet]
    assert set(programmed.values()) == set(table.routes())
    good = {name: entry for name, entry in store.items() if entry.value not in (b"{bad", b"{}")}
    if len(good) == len(store):
        fresh = dual_table()
        fresh.reset(store.values())
        assert {(x.subnet, x.vtep_mac, x.underlay) for x in fresh.routes()} == {
            (x.subnet, x.vtep_mac, x.underlay) for x in table.routes()
        }
