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
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from pytun_pmd3 import TunTapDevice

from pyflannel.dataplane.offload import NO_OFFLOAD, Offload
from pyflannel.dataplane.proc_net import transmit_drops
from pyflannel.dataplane.refusal import Refusal, too_few_descriptors

VNET_HEADER_BYTES = 12
"""Length of the virtio-net header before each packet (struct virtio_net_hdr_mrg_rxbuf)."""

_CLONE_DEVICE = "/dev/net/tun"
_NAME_BYTES = 15
_SPARE_DESCRIPTORS = 32

# linux/if_tun.h
_IFF_TUN = 0x0001
_IFF_MULTI_QUEUE = 0x0100
_IFF_NO_PI = 0x1000
_IFF_VNET_HDR = 0x4000
_FLAGS = _IFF_TUN | _IFF_NO_PI | _IFF_VNET_HDR | _IFF_MULTI_QUEUE
_TUNSETOFFLOAD = 0x400454D0
_TUNSETVNETHDRSZ = 0x400454D8
_TUNSETQUEUE = 0x400454D9
_IFF_DETACH_QUEUE = 0x0400
_TUN_F_CSUM = 0x01
_TUN_F_TSO4 = 0x02
_TUN_F_TSO6 = 0x04
_TUN_F_TSO_ECN = 0x08
_TUN_F_USO4 = 0x20
_TUN_F_USO6 = 0x40

# linux/if_tun.h: USO4 and USO6 only together
_OFFLOAD_FLAGS = (
    (Offload.TSO, _TUN_F_CSUM | _TUN_F_TSO4 | _TUN_F_TSO6 | _TUN_F_TSO_ECN),
    (Offload.USO, _TUN_F_CSUM | _TUN_F_USO4 | _TUN_F_USO6),
)

# linux/sockios.h, linux/ethtool.h: struct ethtool_drvinfo opens with cmd, driver[32]
_SIOCETHTOOL = 0x8946
_ETHTOOL_GDRVINFO = 0x03
_DRVINFO_BYTES = 196


class _Device(TunTapDevice):  # type: ignore[misc]  # the base class is untyped
    """pytun-pmd3's device, without its second close() of the descriptor after a failed open.

    With `fd` it is one that was opened before.
    """

    def __init__(self, name: str, fd: int | None = None) -> None:
        if fd is not None:
            self._fd, self._name = fd, name
            return
        try:
            super().__init__(name, _FLAGS)
        except OSError:
            self._fd = -1
            raise


class Tun:
    """Queues of a persistent TUN device, non-blocking.

    `created` tells whether the device was made by `open`, `is_adopted` whether the queues are
    another process's. The device outlives `close()`, and with it its addresses and routes. Packets
    carry VNET_HEADER_BYTES of virtio-net header and no packet information. `offload` is what of
    Offload.TSO and Offload.USO the kernel agreed to.

    With several queues the kernel spreads flows over them by their hash. Packets are then written
    to one more, detached queue: on an attached one the kernel would learn where a flow's packets
    are written and move the flow to that queue, out of order.
    """

    __slots__ = ("_devices", "created", "is_adopted", "name", "offload", "read_fds", "write_fd")

    def __init__(
        self,
        name: str,
        devices: list[_Device],
        offload: Offload,
        *,
        created: bool = False,
        is_adopted: bool = False,
    ) -> None:
        self.name = name
        self.created = created
        self.is_adopted = is_adopted
        self.offload = offload
        fds: list[int] = [device.fileno() for device in devices]
        self.read_fds = tuple(fds[:1] if len(fds) == 1 else fds[:-1])
        self.write_fd = fds[-1]
        self._devices = devices

    @classmethod
    def open(cls, name: str, queues: int = 1, offload: Offload | None = NO_OFFLOAD) -> Tun:
        """Create or reopen the device `name` with this many queues to read from.

        `offload` None takes what the kernel has. Refusal when the host does not let us, or has not
        what `offload` asks for.
        """
        if not 0 < len(name.encode()) <= _NAME_BYTES:
            raise Refusal(
                f"{name!r} cannot be the name of a network device: Linux allows 1 to "
                f"{_NAME_BYTES} bytes; use a smaller VNI"
            )
        existed = _exists(name)
        devices: list[_Device] = []
        with _closed_on_failure(name, devices):
            for _ in range(queues if queues == 1 else queues + 1):
                devices.append(_Device(name))
            _check_spare_descriptors(devices[0].fileno())
            agreed = _set_up(devices, offload)
        return cls(name, devices, agreed, created=not existed)

    @classmethod
    def adopt(
        cls, name: str, fds: Sequence[int], offload: Offload | None, *, in_use: bool = False
    ) -> Tun:
        """Go on with queues that another process opened; what is queued in them stays.

        `fds` are at least one, the detached one last; they are ours from now on, and there are as
        many queues as that process had. With `in_use` it still moves packets, so nothing is set:
        `offload` is what it uses. Raises as `open` does.
        """
        devices = [_Device(name, fd) for fd in fds]
        if in_use and offload is not None:
            return cls(name, devices, offload, is_adopted=True)
        with _closed_on_failure(name, devices):
            agreed = _set_up(devices, offload)
        return cls(name, devices, agreed, is_adopted=True)

    @property
    def fds(self) -> tuple[int, ...]:
        """All queues, as `adopt` takes them."""
        return tuple(device.fileno() for device in self._devices)

    def drops(self) -> int:
        """Return how many packets to be read the kernel has dropped, since the device was made.

        A queue had no room for them, or nobody held it. A super-packet counts once.
        """
        return transmit_drops(self.name)

    def close(self) -> None:
        """Close the queues and leave the device, its addresses and routes; idempotent."""
        _close(self._devices)
        self._devices = []

    def delete(self) -> None:
        """Close the queues and let the device go with the last one; nothing once closed."""
        if self._devices:
            self._devices[0].persist(False)
            self.close()


@contextmanager
def _closed_on_failure(name: str, devices: list[_Device]) -> Iterator[None]:
    """Close the queues when the host says no, and say so in words."""
    try:
        yield
    except OSError as error:
        _close(devices)
        raise _refusal(name, error) from error
    except BaseException:
        _close(devices)
        raise


def _check_spare_descriptors(fd: int) -> None:
    """Raise EMFILE while it is known for what it is, not by one of the few that are to be opened.

    The queues are the last that a start opens many of.
    """
    with ExitStack() as opened:
        for _ in range(_SPARE_DESCRIPTORS):
            opened.callback(os.close, os.dup(fd))


def _set_up(devices: list[_Device], offload: Offload | None) -> Offload:
    """Make descriptors the queues of one TUN, those to read from first; return the offloads."""
    for device in devices:
        fcntl.ioctl(device.fileno(), _TUNSETVNETHDRSZ, struct.pack("i", VNET_HEADER_BYTES))
        os.set_blocking(device.fileno(), False)
    if len(devices) > 1:
        detach = struct.pack("16sH14x", b"", _IFF_DETACH_QUEUE)
        try:
            fcntl.ioctl(devices[-1].fileno(), _TUNSETQUEUE, detach)
        except OSError as error:
            # It is detached already.
            if error.errno != errno.EINVAL:
                raise
    agreed = _set_offload(devices[0].fileno(), offload)
    devices[0].persist(True)
    return agreed


def _close(devices: list[_Device]) -> None:
    for device in devices:
        device.close()


def _set_offload(fd: int, wanted: Offload | None) -> Offload:
    """Turn on what is wanted, None for all that there is; Refusal when a wanted one is not."""
    agreed, flags = NO_OFFLOAD, 0
    for one, bits in _OFFLOAD_FLAGS:
        if wanted is not None and one not in wanted:
            continue
        try:
            fcntl.ioctl(fd, _TUNSETOFFLOAD, flags | bits)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            if wanted is not None:
                raise Refusal(
                    f"this kernel's TUN has no {one}: take it out of --offload, or use auto"
                ) from None
            continue
        agreed, flags = agreed | one, flags | bits
    if not flags:
        fcntl.ioctl(fd, _TUNSETOFFLOAD, 0)
    return agreed


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
    if error.errno == errno.EMFILE:
        return too_few_descriptors()
    if error.filename == _CLONE_DEVICE:
        return _clone_device_refusal(error)
    if error.errno == errno.EPERM:
        return Refusal(
            f"creating the TUN device {name} is not permitted: run as root or with CAP_NET_ADMIN "
            "(docker run --cap-add=NET_ADMIN)"
        )
    if error.errno == errno.EINVAL and _exists(name):
        return _occupied_refusal(name, _driver(name))
    if error.errno in (errno.EINVAL, errno.ENOTTY):
        return Refusal(
            f"this kernel makes no TUN device {name} with several queues and offload headers "
            f"({error.strerror}): Linux has had both since 3.8, some sandboxes have not; run on "
            "another kernel"
        )
    return Refusal(f"the TUN device {name} cannot be opened: {error.strerror}")


def _clone_device_refusal(error: OSError) -> Refusal:
    if error.errno in (errno.EPERM, errno.EACCES):
        return Refusal(
            f"{_CLONE_DEVICE} may not be opened: run as root, in a container with "
            f"docker run --device={_CLONE_DEVICE}; other users need chmod 666 {_CLONE_DEVICE}"
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
