"""``/ipfs/ping/1.0.0``: whether a control connection is alive, and how far the peer is.

Source: libp2p specs, ping/ping.md.
"""

from __future__ import annotations

import os

import trio

from fabric.core.errors import RemoteProtocolError, Unavailable
from fabric.core.ids import PeerId, short
from fabric.net.host import Host

PROTOCOL_PING = "/ipfs/ping/1.0.0"
PING_BYTES = 32


async def ping(host: Host, peer: PeerId) -> float:
    """Return the round-trip time in seconds over the best control connection.

    Bound it with ``trio.fail_after`` at the call site.

    Raises:
        Unavailable: not connected, or the connection broke.
        RemoteProtocolError: the peer sends back other bytes.
        RemoteRefused: it does not serve pings.
    """
    question = os.urandom(PING_BYTES)
    try:
        async with await host.open_stream(peer, PROTOCOL_PING) as stream:
            started = trio.current_time()
            await stream.send_all(question)
            answer = b""
            while len(answer) < PING_BYTES:
                part = await stream.receive_some(PING_BYTES - len(answer))
                if not part:
                    raise Unavailable(f"{short(peer)} does not answer pings")
                answer += part
    except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
        raise Unavailable(f"connection with {short(peer)} broke: {exc}") from exc
    if answer != question:
        raise RemoteProtocolError(f"{short(peer)} answered a ping with other bytes")
    return trio.current_time() - started
