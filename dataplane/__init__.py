"""The data plane: moves packets between a TUN device and UDP port 8472, and programs the host.

Values: `route`, `refusal`. Packets: `_fastpath.c` with `csrc/` behind the typed facade
`fastpath`; `fib`, `stats` and `forwarder` use it. Host: `tun`, `underlay`, `netlink`,
`interface`.
"""
