"""Which variants meet in which cases and underlays; the whole benchmark is these."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Suite:
    """One comparison; variants are written as on the command line."""

    name: str
    title: str
    variants: tuple[str, ...]
    cases: tuple[str, ...]
    modes: tuple[str, ...] = ("wire-nocsum",)


BASIC = ("tcp1", "tcp1-reverse", "tcp4", "udp64", "rtt")
TCP = tuple(f"tcp{streams}{way}" for streams in (1, 4, 16) for way in ("", "-reverse"))
UDP = tuple(f"udp{size}{flows}" for size in (64, 256, 1024, 1400) for flows in ("", "-8"))

QUICK = Suite("quick", "pyflannel-udp and the kernel", ("plain", "kernel", "ours"), BASIC)
SUITES = (
    Suite(
        "overlays",
        "Overlays on a wire, every checksum real",
        ("plain", "kernel", "ours", "null", "udp-backend", "naive", "wireguard-go", "openvswitch"),
        (*TCP, "tcp1-bbr", "tcp4-bbr", *UDP, "rtt", "rtt-apart"),
    ),
    Suite(
        "underlays",
        "Other underlays",
        ("plain", "kernel", "ours", "null", "udp-backend"),
        (*BASIC, "tcp4-bbr"),
        ("wire", "veth-default"),
    ),
    Suite(
        "slow",
        "A link that is slower than its hosts",
        ("plain", "kernel", "ours", "null", "udp-backend"),
        ("tcp1", "tcp4", "tcp4-bbr"),
        ("wire-1g", "wire-100m"),
    ),
    Suite(
        "mixed",
        "pyflannel-udp with a node of the kernel's device",
        ("kernel", "ours", "from-kernel", "to-kernel"),
        (*BASIC, "tcp4-bbr", "udp64-8", "udp1400"),
    ),
    Suite(
        "offloads",
        "pyflannel-udp at each offload level",
        (
            "kernel",
            "ours",
            "no-offload=--offload=off",
            "gso,gro=--offload=gso,gro",
            "tso,gro=--offload=tso,gro",
            "tso,gso=--offload=tso,gso",
            "tso,gso,gro=--offload=tso,gso,gro",
        ),
        (*BASIC, "udp1400"),
    ),
    Suite(
        "workers",
        "pyflannel-udp with threads and without",
        (
            "kernel",
            "ours",
            *(f"workers-{count}=--workers={count}" for count in (0, 1, 2)),
            "awake=--poll-us=30000",
        ),
        (*BASIC, "udp64-8", "udp1400", "rtt-apart"),
    ),
    Suite(
        "floor",
        "Null forwarders: the floor of each I/O design",
        (
            "kernel",
            "ours",
            "null",
            "null-1thread",
            "null-flat",
            "null-gaps",
            "null-unconnected",
            "null-zerocopy",
            "null-uring",
            "null-uring-1thread",
            "null-uring-sqpoll",
            "null-packet",
            "null-packet-ring",
            "null-tunnel",
            "null-xdp",
            *(f"null-queue-{size}:null=--queue={size}" for size in (500, 64)),
        ),
        (*BASIC, "tcp4-bbr", "udp64-8", "rtt-apart"),
    ),
    Suite(
        "peers",
        "1, 100 and 10,000 peers in the table",
        tuple(
            f"{name}{suffix}"
            for suffix in ("", "-100", "-10000")
            for name in ("kernel", "ours", "udp-backend")
        ),
        ("tcp1", "udp64", "udp64-8", "rtt"),
    ),
)
