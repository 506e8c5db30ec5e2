"""The etcd client that the options describe, for the daemon and for commands that ask etcd."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from pyflannel.command_line.options import Options
from pyflannel.control.etcd import Etcd
from pyflannel.control.etcd_fault import EtcdUnavailable
from pyflannel.control.etcd_tls import EtcdTls
from pyflannel.control.patience import within
from pyflannel.dataplane.refusal import Refusal

T = TypeVar("T")


def etcd_client(options: Options) -> Etcd:
    """Return a client; Refusal for options that do not fit together."""
    return Etcd(
        options.etcd_endpoints,
        tls=EtcdTls(options.etcd_cafile, options.etcd_certfile, options.etcd_keyfile),
        username=options.etcd_username,
        password=options.etcd_password,
    )


async def ask_etcd(options: Options, question: Callable[[Etcd], Awaitable[T]], seconds: float) -> T:
    """Ask once, for a command that does not wait; Refusal when there is no answer in time."""
    # The session logs for a daemon; a command has one sentence.
    logging.getLogger("pyflannel.control").setLevel(logging.CRITICAL)
    etcd = etcd_client(options)
    why = f"no answer in {seconds:.0f} s"
    try:
        return await within(seconds, question(etcd))
    except EtcdUnavailable as error:
        why = str(error)
    except asyncio.TimeoutError:
        why = etcd.session.last_error or why
    finally:
        await etcd.close()
    raise Refusal(f"etcd cannot be asked: {why}; check --etcd-endpoints and its flags")
