"""Open vSwitch with its userspace datapath as a variant: own database and daemon on each host.

Its tunnels leave through a bridge of its own, so the host's address moves there from the cable.
"""

from __future__ import annotations

import shutil
from functools import partial
from ipaddress import IPv4Address
from pathlib import Path

from tests.lab.hosts import CABLE, Host, wait_until

PROGRAMS = ("ovsdb-tool", "ovsdb-server", "ovs-vswitchd", "ovs-vsctl", "ovs-appctl")
SCHEMA = Path("/usr/share/openvswitch/vswitch.ovsschema")


def start_openvswitch(host: Host, peer: IPv4Address, own: IPv4Address) -> None:
    """Give a host the overlay address `own` behind a vxlan tunnel to `peer`."""
    for program in PROGRAMS:
        if shutil.which(program) is None:
            raise RuntimeError(f"the program {program} is not installed")
    folder = host.folder
    socket, control = f"unix:{folder}/db.sock", folder / "switch.ctl"
    host.exec("ovsdb-tool", "create", str(folder / "db"), str(SCHEMA))
    # fmt: off
    host.start("ovsdb-server", str(folder / "db"), f"--remote=p{socket}",
               f"--unixctl={folder}/db.ctl", log=host.log)
    # fmt: on
    wait_until((folder / "db.sock").exists, "ovsdb-server listens")
    vsctl = partial(host.exec, "ovs-vsctl", f"--db={socket}")
    vsctl("--no-wait", "init")
    host.start("ovs-vswitchd", socket, f"--unixctl={control}", log=host.log)
    wait_until(control.exists, "ovs-vswitchd answers")
    for bridge in ("phy", "overlay"):
        vsctl("add-br", bridge, "--", "set", "bridge", bridge, "datapath_type=netdev")
    vsctl("add-port", "phy", host.iface)
    host.ip("addr", "flush", "dev", host.iface)
    host.ip("addr", "add", f"{host.address}/{CABLE.prefixlen}", "dev", "phy")
    host.ip("link", "set", "phy", "up")
    # fmt: off
    vsctl("add-port", "overlay", "tunnel", "--", "set", "interface", "tunnel", "type=vxlan",
          f"options:remote_ip={peer}", f"options:local_ip={host.address}", "options:key=1",
          "options:dst_port=8472")
    # fmt: on
    host.ip("addr", "add", f"{own}/30", "dev", "overlay")
    host.ip("link", "set", "overlay", "mtu", "1450", "up")
