"""Ask a data-plane listener where our control port is seen, on a connection for that.

A control connection that the peer dialled, or that had to leave from another port (the
same pair of ports had one already), tells nothing about ours. The data-plane listeners
of the same peers are other destinations, hence other connections.
"""

from __future__ import annotations

import socket
import struct

import trio

from fabric.core.errors import NoRoute, RemoteProtocolError
from fabric.core.framing import FrameReader
from fabric.core.ids import PeerId
from fabric.net.offers import OBSERVE_LABEL, format_address, parse_address_untrusted
from fabric.net.port_reuse import share
from nat.reachability.observed_mapping import Observation

MAX_ANSWER_BYTES = 64
"""An "[ip]:port"."""
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # struct linger: on, 0 s


async def observe_from(port: int, target: tuple[str, int]) -> Observation:
    """Return where the listener at ``target`` sees our ``port``.

    Bound it with ``trio.fail_after`` at the call site.

    Raises:
        NoRoute: the port cannot be used for it, or nobody answers.
        RemoteProtocolError: the answer is no address.
    """
    ip = target[0]
    family, any_ip = (
        (socket.AF_INET6, "::") if ":" in ip else (socket.AF_INET, "0.0.0.0")
    )
    with trio.socket.socket(family, socket.SOCK_STREAM) as sock:
        try:
            share(sock)
            # nothing is lost with it: no TIME_WAIT, where those block the next one
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            await sock.bind((any_ip, port))
            await sock.connect(target)
            local = format_address(*sock.getsockname()[:2])
            await sock.send(OBSERVE_LABEL)  # 16 bytes fit an empty buffer
            seen = await _answer_untrusted(sock)
        except OSError as exc:
            raise NoRoute(f"{ip}: {exc.strerror or exc}") from exc
    return Observation(
        observer=PeerId(format_address(*target)),
        observer_ip=ip,
        local=local,
        observed=format_address(*seen),
        at=trio.current_time(),
    )


async def _answer_untrusted(sock: trio.socket.SocketType) -> tuple[str, int]:
    reader = FrameReader(max_bytes=MAX_ANSWER_BYTES)
    while data := await sock.recv(MAX_ANSWER_BYTES):
        for frame in reader.feed(data):
            return parse_address_untrusted(frame.decode("ascii", "replace"))
    raise RemoteProtocolError("the listener observed nothing")
