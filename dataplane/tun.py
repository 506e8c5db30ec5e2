"""The TUN device: opens it with the flags all workers share and says in words why it cannot.

It does not know addresses, MTU or routes (`netlink` sets them), and moves no packet.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import socket
import struct

from pytun_pmd3 import TunTapDevice

from pyflannel.dataplane.refusal import Refusal

VNET_HEADER_BYTES = 12
"""Length of the virtio-net header before each packet (struct virtio_net_hdr_mrg_rxbuf)."""

_CLONE_DEVICE = "/dev/net/tun"
_NAME_BYTES = 15

# linux/if_tun.h
_IFF_TUN = 0x0001
_IFF_MULTI_QUEUE = 0x0100
_IFF_NO_PI = 0x1000
_IFF_VNET_HDR = 0x4000
_FLAGS = _IFF_TUN | _IFF_NO_PI | _IFF_VNET_HDR | _IFF_MULTI_QUEUE
_TUNSETOFFLOAD = 0x400454D0
_TUNSETVNETHDRSZ = 0x400454D8

# linux/sockios.h, linux/ethtool.h: struct ethtool_drvinfo opens with cmd, driver[32]
_SIOCETHTOOL = 0x8946
_ETHTOOL_GDRVINFO = 0x03
_DRVINFO_BYTES = 196


class _Device(TunTapDevice):  # type: ignore[misc]  # the base class is untyped
    """pytun-pmd3's device, without its second close() of the descriptor after a failed open."""

    def __init__(self, name: str) -> None:
        try:
            super().__init__(name, _FLAGS)
        except OSError:
            self._fd = -1
            raise


class Tun:
    """One queue of a persistent TUN device, non-blocking, offloads off.

    `created` tells whether the device was made by this call. The device outlives `close()`, and
    with it its addresses and routes (decision: persistent, whatever the number of workers).
    """

    __slots__ = ("_device", "created", "name")

    def __init__(self, name: str, device: _Device, *, created: bool) -> None:
        self.name = name
        self.created = created
        self._device = device

    @classmethod
    def open(cls, name: str) -> Tun:
        """Create or reopen the device `name`; Refusal when the host does not let us.

        A further call on the same name opens a further queue. Packets on the descriptor carry
        VNET_HEADER_BYTES of virtio-net header and no packet information.
        """
        if not 0 < len(name.encode()) <= _NAME_BYTES:
            raise Refusal(
                f"{name!r} cannot be the name of a network device: Linux allows 1 to "
                f"{_NAME_BYTES} bytes; use a smaller VNI"
            )
        existed = _exists(name)
        try:
            device = _Device(name)
        except OSError as error:
            raise _refusal(name, error) from error
        try:
            fd = device.fileno()
            fcntl.ioctl(fd, _TUNSETVNETHDRSZ, struct.pack("i", VNET_HEADER_BYTES))
            fcntl.ioctl(fd, _TUNSETOFFLOAD, 0)
            os.set_blocking(fd, False)
            device.persist(True)
        except BaseException:
            device.close()
            raise
        return cls(name, device, created=not existed)

    @property
    def fd(self) -> int:
        """The descriptor of the queue, -1 once closed; it stays ours to close."""
        fd: int = self._device.fileno()
        return fd

    def close(self) -> None:
        """Close the queue and leave the device, its addresses and routes; idempotent."""
        self._device.close()

    def delete(self) -> None:
        """Close the queue and let the device go with its last queue; nothing once closed."""
        if self.fd >= 0:
            self._device.persist(False)
            self._device.close()


def _exists(name: str) -> bool:
    try:
        socket.if_nametoindex(name)
    except OSError:
        return False
    return True


def _driver(name: str) -> str:
    """Name of the driver behind a device, "" when it has none to tell (SIOCETHTOOL)."""
    drvinfo = ctypes.create_string_buffer(struct.pack("I", _ETHTOOL_GDRVINFO), _DRVINFO_BYTES)
    ifreq = struct.pack("16sP16x", name.encode(), ctypes.addressof(drvinfo))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        try:
            fcntl.ioctl(control, _SIOCETHTOOL, ifreq)
        except OSError:
            return ""
    return drvinfo.raw[4:36].split(b"\0", 1)[0].decode("ascii", "replace")


def _refusal(name: str, error: OSError) -> Refusal:
    if error.filename == _CLONE_DEVICE:
        return _clone_device_refusal(error)
    if error.errno == errno.EPERM:
        return Refusal(
            f"creating the TUN device {name} is not permitted: run as root or with CAP_NET_ADMIN "
            "(docker run --cap-add=NET_ADMIN)"
        )
    if error.errno == errno.EINVAL and _exists(name):
        return _occupied_refusal(name, _driver(name))
    return Refusal(f"the TUN device {name} cannot be opened: {error.strerror}")


def _clone_device_refusal(error: OSError) -> Refusal:
    if error.errno in (errno.EPERM, errno.EACCES):
        return Refusal(
            f"{_CLONE_DEVICE} may not be opened: run as root, in a container with "
            f"docker run --device={_CLONE_DEVICE}"
        )
    if error.errno == errno.ENOENT:
        return Refusal(
            f"{_CLONE_DEVICE} is missing: `modprobe tun`, or `mkdir -p /dev/net && mknod "
            f"{_CLONE_DEVICE} c 10 200`, or docker run --device={_CLONE_DEVICE}"
        )
    return Refusal(
        f"{_CLONE_DEVICE} cannot be opened ({error.strerror}): load the driver with `modprobe tun`"
    )


def _occupied_refusal(name: str, driver: str) -> Refusal:
    if driver == "tun":
        return Refusal(
            f"{name} is a TUN or TAP device made by another program with other flags: stop that "
            f"program and delete the device with `ip link delete {name}`"
        )
    if driver == "vxlan":
        return Refusal(
            f"{name} is a kernel vxlan device, left by flanneld: stop flanneld and delete the "
            f"device with `ip link delete {name}`"
        )
    return Refusal(
        f"a {driver or 'network'} device named {name} exists already: delete it with "
        f"`ip link delete {name}` if nobody needs it"
    )
