"""Ports of a SeaweedFS server, and the sockets that it names after them."""

from __future__ import annotations

import contextlib
import errno
import random
import socket
from collections.abc import Mapping
from pathlib import Path

_ROLES = ("master", "volume", "filer", "s3", "admin")
_PORTS = range(20_000, 32_000)  # below the range that Linux takes outgoing ports from
_ADMIN_PORTS = range(61_000, 65_536)  # above that range: see free_ports


def free_ports() -> dict[str, int]:
    """A free port of 127.0.0.1 for each role, and one for its gRPC.

    SeaweedFS's worker looks for the admin's gRPC at its port + 10,000, whatever it was told, and tries
    every few seconds: the admin's port is so high that the sum is no port, and nobody else's server is called.
    """
    names = [name for role in _ROLES for name in (role, f"{role}.grpc")]
    names.remove("admin")
    with contextlib.ExitStack() as held:
        ports = dict(zip(names, _free(_PORTS, len(names), held), strict=True))
        (ports["admin"],) = _free(_ADMIN_PORTS, 1, held)
        return ports


def _free(among: range, count: int, held: contextlib.ExitStack) -> list[int]:
    found: list[int] = []
    for port in random.sample(among, len(among)):  # nosec B311  # no secret
        listener = held.enter_context(socket.socket())
        try:
            listener.bind(("127.0.0.1", port))
        except OSError:
            continue
        found.append(port)
        if len(found) == count:
            return found
    raise OSError(errno.EADDRINUSE, f"no {count} free ports between {among.start} and {among.stop - 1} on 127.0.0.1")


def remove_sockets(ports: Mapping[str, int]) -> None:
    """SeaweedFS puts sockets that are named after its ports into /tmp, whatever TMPDIR says."""
    for name, port in ports.items():
        socket_name = f"seaweedfs-{name.replace('.', '-')}-{port}.sock"
        Path("/tmp", socket_name).unlink(missing_ok=True)  # nosec B108  # where SeaweedFS puts it
