"""On the wire our packets are the kernel's, and what a kernel's device may send we accept.

h1 (ours, then the kernel's device with the same MAC) --- switch --- h2 (listens only)
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Network

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.l2 import Ether
from scapy.layers.vxlan import VXLAN
from scapy.packet import Packet, raw

from tests.dataplane.twin import checksum
from tests.lab.hosts import PREFIX, Host, Lab, lab, wait_until
from tests.lab.inside import inside
from tests.lab.kernel_node import program_kernel_node, start_kernel_node
from tests.lab.require import require_program, require_root
from tests.lab.wire import send_packet, tap

PORT = 8472
PEER_SUBNET, PEER_MAC = IPv4Network("10.244.200.0/24"), "0a:00:00:00:00:08"
SOURCE, TARGET = "10.244.77.9", "10.244.200.9"


@pytest.fixture
def made() -> Iterator[Lab]:
    require_root()
    for program in ("ip", "bridge", "ethtool", "etcd", "etcdctl"):
        require_program(program)
    with lab(2) as made:
        made.put_config()
        value = {
            "PublicIP": str(made.hosts[1].address),
            "PublicIPv6": None,
            "BackendType": "vxlan",
            "BackendData": {"VNI": 1, "VtepMAC": PEER_MAC},
        }
        made.etcdctl("put", f"{PREFIX}/subnets/{PEER_SUBNET[0]}-24", json.dumps(value))
        yield made


def inner_packets() -> list[bytes]:
    """Every protocol with every ECN and some DSCP, every size that matters, fragments, options."""
    protocols: tuple[Packet, ...] = (
        ICMP(id=7, seq=1),
        TCP(sport=40000, dport=80, flags="PA", seq=1, ack=1),
        UDP(sport=40000, dport=53),
    )
    toses = (0x00, 0x01, 0x02, 0x03, 0xB8, 0xB9, 0xBA, 0xBB, 0x10, 0xFF)
    made = [
        IP(tos=tos, ttl=63) / protocol / bytes(range(56)) for protocol in protocols for tos in toses
    ]
    for length in (0, 1, 2, 555, 1409, 1410):
        made += [IP(ttl=1, flags="DF") / TCP(sport=1) / bytes(length)]
        made += [IP(ttl=255) / UDP(sport=length + 1) / (b"\xff" * length)]
    made += [
        IP(flags="MF") / UDP(sport=9, dport=9, len=2000) / bytes(1000),
        IP(frag=126, proto=17) / bytes(992),
        IP(proto=253),
        IP(options=[b"\x07\x07\x04\x00\x00\x00\x00", b"\x00"]) / ICMP() / bytes(9),
    ]
    for number, packet in enumerate(made, 1):
        packet.src, packet.dst, packet.id = SOURCE, TARGET, number
    return [raw(packet) for packet in made]


def _sum16(octets: bytes) -> bytes:
    return checksum(octets).to_bytes(2, "big")


def canonical(frame: bytes) -> bytes:
    """Return the frame with what decision 27 exempts set to one value; its checksums are right.

    MACs are left as they are: both senders have the same.
    """
    ip, udp, payload = bytearray(frame[14:34]), bytearray(frame[34:42]), frame[42:]
    pseudo = bytes(ip[12:20]) + b"\0\x11" + bytes(udp[4:6])
    assert checksum(bytes(ip)) == 0
    assert udp[6:8] != b"\0\0"
    assert checksum(pseudo + bytes(udp) + payload) == 0
    assert 32768 <= int.from_bytes(udp[0:2], "big") <= 60999
    ip[4:6] = udp[0:2] = ip[10:12] = udp[6:8] = b"\0\0"
    ip[10:12] = _sum16(bytes(ip))
    udp[6:8] = _sum16(pseudo + bytes(udp) + payload)
    return frame[:14] + bytes(ip) + bytes(udp) + payload


def captured(made: Lab, packets: list[bytes]) -> list[bytes]:
    """Send packets from h1, one after another, and return what arrives at h2."""
    sender, listener = made.hosts
    frames = []
    with tap(listener, "eth0") as wire:
        for packet in packets:
            send_packet(sender, packet)
            frames += list(wire.vxlan_frames(PORT, 1))
    return frames


def _mac(made: Lab, host: Host) -> str:
    data = next(x for x in made.leases().values() if x["PublicIP"] == str(host.address))
    backend = data["BackendData"]
    assert isinstance(backend, dict)
    return str(backend["VtepMAC"])


def test_a_packet_of_ours_is_the_kernels_byte_for_byte(made: Lab) -> None:
    host = made.hosts[0]
    packets = inner_packets()
    daemon = made.start_daemon(host)
    mac = _mac(made, host)
    # So that neither sender asks for the address, nor anybody answers it with an error.
    for here, there in (made.hosts, reversed(made.hosts)):
        address = json.loads(there.ip("-j", "link", "show", "eth0"))[0]["address"]
        # fmt: off
        here.ip("neigh", "replace", str(there.address), "lladdr", address, "dev", "eth0", "nud",
                "permanent")
        # fmt: on
    ours = captured(made, packets)
    host.stop(daemon)
    host.ip("link", "del", "flannel.1")

    start_kernel_node(made, host, IPv4Network("10.244.77.0/24"), mac)
    program_kernel_node(made, host)
    kernels = captured(made, packets)
    for packet, our, kernel in zip(packets, ours, kernels, strict=True):
        assert our[64:] == packet
        assert canonical(our) == canonical(kernel), (our.hex(), kernel.hex())


def test_any_source_port_and_no_checksum_are_accepted(made: Lab) -> None:
    host, peer = made.hosts
    made.start_daemon(host, "--healthz-port", "8081")
    own = host.subnet_env()["FLANNEL_SUBNET"].rsplit(".", 1)[0] + ".0"
    mac = _mac(made, host)

    def listen() -> socket.socket:
        made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        made.bind((own, 9999))
        made.settimeout(10)
        return made

    with inside(host, listen) as listener:
        for port in (1, 8472, 32768, 40000, 65535):
            for unsummed in (False, True):
                text = f"{port} {unsummed}".encode()
                packet = IP(src=TARGET, dst=own) / UDP(sport=5, dport=9999) / text
                vxlan = raw(VXLAN(vni=1)) + raw(Ether(src=PEER_MAC, dst=mac, type=0x0800) / packet)
                outer = IP(src=str(peer.address), dst=str(host.address), id=1)
                udp = UDP(sport=port, dport=PORT, chksum=0 if unsummed else None)
                send_packet(peer, raw(outer / udp / vxlan))
                assert listener.recvfrom(100) == (text, (TARGET, 5))


def test_what_is_counted_is_what_went_over_the_wire(made: Lab) -> None:
    host = made.hosts[0]
    made.start_daemon(host, "--healthz-port", "8081")
    packets = inner_packets()
    captured(made, packets)
    send_packet(host, raw(IP(src=SOURCE, dst="10.244.201.9") / ICMP()))
    program = "import urllib.request as r;print(r.urlopen('http://127.0.0.1:8081/metrics').read().decode())"

    def sample(name: str) -> float:
        lines = host.exec("python3", "-c", program).splitlines()
        return float(next(x.rsplit(" ", 1)[1] for x in lines if x.startswith(f"pyflannel_{name} ")))

    peer = f'{{subnet="{PEER_SUBNET}",direction="encap"}}'
    wait_until(lambda: sample(f"peer_packets_total{peer}") == len(packets), "all are counted", 5)
    assert sample(f"peer_bytes_total{peer}") == sum(map(len, packets))
    assert sample('packets_total{device="flannel.1",direction="encap"}') == len(packets)
    assert sample("ready") == 1
    assert IPv4Address(TARGET) in PEER_SUBNET
