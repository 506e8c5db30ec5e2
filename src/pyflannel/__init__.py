"""pyflannel-udp: a flannel VXLAN node that needs no kernel vxlan device.

`cli` and `options` read the command line, `flags` and `usage` hold what there is to type, `daemon`
composes the two planes, `log`, `health` and `notify` tell the operator. The planes are
`pyflannel.control` and `pyflannel.dataplane`.
"""
