"""pyflannel-udp: a flannel VXLAN node that needs no kernel vxlan device.

`cli` is the command, `daemon` composes the two planes, `pyflannel.control` and
`pyflannel.dataplane`. Each folder uses only those named before it: `command_line` (what there is
to type), `management` (how a daemon tells), `node` (the parts of a running one), `commands` (what
an operator asks, and gets told). `etcd_access` is for all of them.
"""
