"""The control plane: keeps the subnet-to-VTEP table in sync with etcd, and our own lease alive.

Without I/O: `lease` (keys and values), `lease_table` and `family_routes` (what we believe, and what
each address family uses of it), `network_config`, `subnet_pool`, `vtep_identity`. With I/O: `etcd`
and `etcd3_stubs` (the only network access), `lease_keeper` (own lease), `route_sync` (other leases
to the data plane), `subnet_file`.
"""
