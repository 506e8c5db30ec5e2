"""The kernel's routes to peers, in a namespace with a real TUN.

lone namespace:   eth0 === veth0        flannel.1 (TUN)
               192.0.2.11/24           10.244.5.0/32
"""

from __future__ import annotations

import errno
import json
import socket
import time
from collections.abc import Iterator, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network

import pytest

from pyflannel.dataplane import kernel_routes
from pyflannel.dataplane.host_change import RouteChanged
from pyflannel.dataplane.host_events import parse_events
from pyflannel.dataplane.kernel_routes import DirectRouting, PeerRoutes
from pyflannel.dataplane.route import IPNetwork
from tests.lab.hosts import Namespace
from tests.lab.inside import inside, namespace_with_tun
from tests.lab.require import require_program, require_root

DEVICE = "flannel.1"
FIRST, SECOND, THIRD = (ip_network(f"10.244.{n}.0/24") for n in (6, 7, 8))
OURS = ip_network("10.244.5.0/24")
UNDERLAY = IPv4Address("192.0.2.12")
IPV4_ROUTES = 1 << 6  # RTNLGRP_IPV4_ROUTE


@pytest.fixture
def host() -> Iterator[Namespace]:
    require_root()
    require_program("ip")
    with namespace_with_tun(DEVICE) as made:
        made.ip("addr", "add", "10.244.5.0/32", "dev", DEVICE)
        made.ip("link", "set", DEVICE, "up")
        yield made


def write(
    host: Namespace, replace: Sequence[IPNetwork], delete: Sequence[IPNetwork] = ()
) -> list[tuple[IPNetwork, int]]:
    peers = dict.fromkeys(replace, UNDERLAY)
    return inside(
        host, lambda: PeerRoutes(DEVICE, None, mtu=1450, overhead=50).apply(peers, delete)
    )


def sync(
    host: Namespace, wanted: Sequence[IPNetwork], direct: DirectRouting | None = None
) -> tuple[int, int, list[tuple[IPNetwork, int]]]:
    peers = dict.fromkeys(wanted, UNDERLAY)
    return inside(host, lambda: PeerRoutes(DEVICE, direct, mtu=1450, overhead=50).sync(peers))


def routes(host: Namespace) -> list[str]:
    return [line.strip() for line in host.ip("route", "show", "dev", DEVICE).splitlines()]


def route(subnet: IPNetwork) -> str:
    return f"{subnet} via {subnet.network_address} onlink"


def test_routes_are_written_as_flannel_writes_them(host: Namespace) -> None:
    assert write(host, [FIRST, SECOND]) == []
    assert routes(host) == [route(FIRST), route(SECOND)]
    (first, _) = json.loads(host.ip("-d", "-j", "route", "show", "dev", DEVICE))
    assert (first["protocol"], first["scope"], first["type"]) == ("boot", "global", "unicast")
    assert write(host, [FIRST], [SECOND]) == []
    assert write(host, [], [SECOND]) == []
    assert routes(host) == [route(FIRST)]


def test_routes_written_ahead_are_the_same(host: Namespace) -> None:
    def ahead(direct: DirectRouting | None = None) -> bool:
        return inside(host, PeerRoutes(DEVICE, direct, mtu=1450, overhead=50).may_write_ahead)

    peers = dict.fromkeys([FIRST, SECOND], UNDERLAY)
    direct = DirectRouting(ip_network("10.244.0.0/16"), 24)
    assert ahead() and not ahead(direct)
    failed = inside(
        host,
        lambda: PeerRoutes(DEVICE, None, mtu=1450, overhead=50).write_ahead(peers, []),
    )
    before = routes(host)
    assert failed == [] and not ahead()
    assert sync(host, [FIRST, SECOND]) == (0, 0, [])
    assert routes(host) == before == [f"{x} via {x[0]} onlink" for x in (FIRST, SECOND)]


def test_a_refused_route_is_told_by_errno_and_the_others_stand(host: Namespace) -> None:
    assert write(host, [FIRST, OURS, SECOND]) == [(OURS, errno.EINVAL)]
    assert routes(host) == [route(FIRST), route(SECOND)]
    assert sync(host, [FIRST, OURS, SECOND]) == (1, 0, [(OURS, errno.EINVAL)])


def test_every_refusal_is_told_in_whichever_batch_and_place(
    host: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_routes, "WRITES", 2)
    refused = [OURS, *(ip_network(f"10.244.5.{n}/32") for n in (1, 2))]
    for subnet in refused[1:]:
        host.ip("addr", "add", str(subnet), "dev", DEVICE)
    peers = [refused[0], FIRST, SECOND, refused[1], refused[2]]
    assert write(host, peers) == [(subnet, errno.EINVAL) for subnet in refused]
    assert routes(host) == [route(FIRST), route(SECOND)]


def test_what_we_wrote_ourselves_is_no_event(host: Namespace) -> None:
    ours = PeerRoutes(DEVICE, None, mtu=1450, overhead=50)
    with inside(host, lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)) as events:
        events.bind((0, IPV4_ROUTES))
        inside(host, lambda: ours.apply({FIRST: UNDERLAY, SECOND: UNDERLAY}, []))
        inside(host, lambda: ours.apply({}, [FIRST]))
        host.ip("route", "del", str(SECOND))
        messages = b"".join(events.recv(1 << 16) for _ in range(4))
    index = json.loads(host.ip("-j", "link", "show", DEVICE))[0]["ifindex"]
    assert list(parse_events(messages, ours.port)) == [RouteChanged(SECOND, index, True)]
    assert len(list(parse_events(messages))) == 4


def test_a_device_that_is_gone_is_told(host: Namespace) -> None:
    host.ip("link", "del", DEVICE)
    with pytest.raises(OSError) as caught:
        sync(host, [FIRST])
    assert (caught.value.errno, caught.value.strerror) == (errno.ENODEV, "No such device")


def test_stale_and_missing_routes_are_mended_and_others_left_alone(host: Namespace) -> None:
    write(host, [FIRST])
    left_alone = (
        f"10.244.21.0/24 dev {DEVICE} scope link",
        f"10.244.23.0/24 via 10.244.23.0 dev {DEVICE} proto static onlink",
        "10.244.24.0/24 via 192.0.2.1 dev eth0",
    )
    for line in (
        f"{SECOND} via 10.244.99.0 dev {DEVICE} onlink",
        f"10.244.20.0/24 via 10.244.20.0 dev {DEVICE} onlink",
        f"10.244.22.0/24 via 10.244.22.0 dev {DEVICE} onlink metric 5",
        *left_alone,
    ):
        host.ip("route", "add", *line.split())
    wanted = [FIRST, SECOND, THIRD]
    assert sync(host, wanted) == (2, 2, [])
    found = [line.strip() for line in host.ip("route").splitlines()]
    mended = [f"{x} via {x.network_address} dev {DEVICE} onlink" for x in wanted]
    assert found[:-1] == [*mended, *left_alone]
    assert sync(host, wanted) == (0, 0, [])


def test_a_peer_on_our_link_is_reached_directly_and_one_behind_a_router_is_not(
    host: Namespace,
) -> None:
    direct = DirectRouting(IPv4Network("10.244.0.0/16"), 24)
    assert sync(host, [FIRST], direct) == (1, 0, [])
    assert f"{FIRST} via {UNDERLAY} dev eth0" in host.ip("route")
    host.ip("route", "add", f"{UNDERLAY}/32", "via", "192.0.2.1")
    assert sync(host, [FIRST], direct) == (1, 0, [])
    assert routes(host) == [route(FIRST)]


def test_an_ipv6_peer_moves_behind_a_router_and_back(host: Namespace) -> None:
    subnet, underlay = IPv6Network("2001:db8:42:6::/64"), IPv6Address("2001:db8:77::12")
    host.ip("addr", "add", "2001:db8:77::11/64", "dev", "eth0", "nodad")
    direct = DirectRouting(IPv6Network("2001:db8:42::/56"), 64)
    ours = PeerRoutes(DEVICE, direct, mtu=1430, overhead=70)
    detour = (f"{underlay}/128", "via", "2001:db8:77::1")
    straight = f"{subnet} via {underlay} dev eth0 metric 1024 pref medium"
    encapsulated = (
        f"{subnet} via {subnet.network_address} dev {DEVICE} metric 1024 onlink pref medium"
    )
    for change, way in ((None, straight), ("add", encapsulated), ("del", straight)):
        if change is not None:
            host.ip("route", change, *detour)
        assert inside(host, lambda: ours.apply({subnet: underlay}, [])) == []
        found = [x.strip() for x in host.ip("-6", "route").splitlines() if str(subnet) in x]
        assert found == [way]


def test_the_mtu_on_the_way_is_that_of_the_table_that_rules_choose(host: Namespace) -> None:
    source = IPv4Address("192.0.2.11")
    host.ip("rule", "add", "from", str(source), "lookup", "100")
    host.ip("route", "add", f"{UNDERLAY}/32", "dev", "eth0", "mtu", "1400", "table", "100")
    ours = PeerRoutes(DEVICE, None, mtu=1450, overhead=50, source=source)
    assert inside(host, lambda: ours.sync({FIRST: UNDERLAY})) == (1, 0, [])
    assert routes(host) == [f"{route(FIRST)} mtu 1350"]
    ours.source = IPv4Address("192.0.2.99")  # which the host has not, as while it is renumbered
    assert inside(host, lambda: ours.sync({FIRST: UNDERLAY})) == (1, 0, [])
    assert routes(host) == [route(FIRST)]


@pytest.mark.alone
def test_ten_thousand_routes_come_and_go_in_bulk(host: Namespace) -> None:
    many = list(IPv4Network("10.0.0.0/8").subnets(new_prefix=24))[:10_000]
    start = time.monotonic()
    assert write(host, many) == []
    # 1.3 s, all of it the kernel's: it compares each new next hop with all others of the device.
    # A program or a thread for each route takes over 20.
    assert time.monotonic() - start < 12
    assert len(routes(host)) == len(many)
    assert sync(host, many) == (0, 0, [])
    assert write(host, [], many) == []
    assert routes(host) == []
