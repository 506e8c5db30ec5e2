"""Ten thousand mutated keys and values: none removes a good peer, none crashes."""

from __future__ import annotations

import logging
from ipaddress import IPv4Address, IPv4Network

from hypothesis import given, settings
from hypothesis import strategies as st

from pyflannel.control.family_routes import Place
from pyflannel.control.lease import KeyValue, LeaseSubnet
from pyflannel.control.lease_table import LeaseTable

SUBNETS = b"/coreos.com/network/subnets/"
GOOD = (
    b'{"PublicIP":"192.0.2.2","PublicIPv6":null,"BackendType":"vxlan",'
    b'"BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:02"}}'
)
NAMES = (
    b"10.5.2.0-24",
    b"10.5.9.0-24",
    b"10.5.1.0-24",
    b"10.5.9.0-24&fd00:9::-64",
    b"10.5.2.128-25",
    b"10.5.0.0-16",
    b"0.0.0.0-0",
    b"foo",
    b"",
)
VALUES = (
    GOOD,
    GOOD.replace(b"0.2.2", b"0.2.9"),
    GOOD.replace(b"0.2.2", b"0.2.1"),
    GOOD.replace(b"vxlan", b"host-gw"),
    GOOD.replace(b"02:00:00:00:00:02", b""),
    b"{bad",
    b"{}",
    b"",
)


@st.composite
def mutations(draw: st.DrawFn, seeds: tuple[bytes, ...]) -> bytes:
    """One of the seeds with up to three runs of bytes replaced, put in or cut out."""
    text = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, len(text)))
        text[start : start + draw(st.integers(0, 8))] = draw(st.binary(max_size=8))
    return bytes(text)


@given(
    events=st.lists(
        st.tuples(mutations(NAMES), mutations(VALUES), st.booleans(), st.integers(2, 99)),
        min_size=10,
        max_size=10,
    )
)
@settings(max_examples=1_000)
def test_no_mutation_removes_a_good_peer(
    events: list[tuple[bytes, bytes, bool, int]],
) -> None:
    """The peer is the oldest lease, so no other may take its place; only its own key may end it."""
    logging.disable(logging.WARNING)
    try:
        table = LeaseTable([Place(IPv4Network("10.5.0.0/16"), IPv4Address("192.0.2.1"))], 8472)
        table.set_own_subnet(LeaseSubnet(IPv4Network("10.5.1.0/24")))
        peer = KeyValue(SUBNETS + b"10.5.2.0-24", GOOD, 1, 1, 1, 7)
        table.put(peer)
        (good,) = table.routes()
        store = {peer.key: peer}
        for name, value, is_deleted, revision in events:
            key = SUBNETS + name
            if key == peer.key:
                continue
            if is_deleted:
                store.pop(key, None)
                table.delete(key)
            else:
                store[key] = KeyValue(key, value, revision, revision, 1, 0)
                table.put(store[key])
            assert good in table.routes()
        table.reset(store.values())
        assert good in table.routes()
        table.reset([], same_history=False)
        assert good in table.routes()
    finally:
        logging.disable(logging.NOTSET)
