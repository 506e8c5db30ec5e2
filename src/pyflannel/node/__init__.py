"""The parts of a running node, each of which `daemon` starts in its turn.

Start: `predecessor` and `takeover` (from a running process), `first_reads`, `underlying` (what
carries the overlay), `vtep_mac`. Per address family: `overlay`, all of them `overlays`; their
routes in the kernel: `route_writer`, and packet filter: `traffic`. While it runs: `host_watch`,
`reload`, `pulse`. What it shows, of all `parts`: `status` with `lease_value`, `metrics`, `trace`,
`suspects`.
"""
