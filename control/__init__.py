"""The control plane: keeps the subnet-to-VTEP table in sync with etcd, and our own lease alive.

Without I/O: `lease` (keys and values), `lease_table` and `family_routes` (what we believe, and what
each address family uses of it), `history` (is it still the same store), `own_lease` and
`etcd_session` (the two state machines), `etcd_fault` (what an error means), `network_config`,
`subnet_pool`, `vtep_identity`; `patience` has the waits of the whole daemon. With I/O: `etcd` over
`etcd_connection`, `etcd_tls`, `quiet_grpc` and `etcd3_stubs` (the only network access),
`lease_keeper` and `lease_writer` (own lease), `route_sync` (other leases to the data plane),
`lease_list`, `subnet_file`.
"""
