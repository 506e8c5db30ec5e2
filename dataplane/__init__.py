"""The data plane: moves packets between a TUN device and UDP port 8472, and programs the host.

Values: `route`, `offload`, `refusal`. Packets: `_fastpath.c` with `csrc/` behind the typed facade
`fastpath`; `forwarder` lets it run. Host: `tun`, `underlay`, `netlink`,
`kernel_routes`, `interface`, `sysctl`; its packet filter: `traffic_rules` (which), `firewall`
(written how), `firewall_watch` (changed when).
"""
