"""The yardstick "what anybody would write": TUN to UDP, one read and one send for each packet.

    naive.py --local ADDRESS --peer ADDRESS --address A --peer-address B

One fixed peer, a constant Ethernet and VXLAN header, no checks.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import select
import socket
import struct

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 1, 0x1000
HEADER = bytes.fromhex("08000000000001000200000000010200000000020800")
PORT, ROOM = 8472, 65536


def main() -> None:
    """Forward until killed."""
    parser = argparse.ArgumentParser()
    for name in ("--local", "--peer", "--address", "--peer-address"):
        parser.add_argument(name, required=True)
    given = parser.parse_args()
    tun = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH22x", b"bench0", IFF_TUN | IFF_NO_PI))
    wire = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    wire.bind((given.local, PORT))
    while True:
        for ready in select.select([tun, wire.fileno()], [], [])[0]:
            if ready != tun:
                os.write(tun, wire.recv(ROOM)[len(HEADER) :])
            else:
                wire.sendto(HEADER + os.read(tun, ROOM), (given.peer, PORT))


if __name__ == "__main__":
    main()
