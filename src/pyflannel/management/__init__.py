"""The management plane: how a daemon tells how it is, whoever asks.

`log` (the operator's lines), `health` (readiness, over HTTP), `control_socket` (commands on this
host, and a successor), `notify` (the service supervisor).
"""
