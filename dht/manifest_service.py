"""Get a manifest from whichever of several peers answers with the right one."""

from __future__ import annotations

from collections.abc import Sequence

import trio

from dht.config import ContentConfig
from dht.manifest import decode_manifest_untrusted
from dht.messages import CODEC, METHOD_MANIFEST, Ask, Manifest
from fabric.core.errors import (
    FabricError,
    IntegrityError,
    RemoteProtocolError,
    Unavailable,
)
from fabric.core.ids import BlobId, PeerId
from fabric.net.rpc_api import Rpc


class HoldersAway(Unavailable):
    """Nobody has it of those who answered, and others could not be asked: wait."""


async def fetch_manifest(
    rpc: Rpc, root: BlobId, peers: Sequence[PeerId], config: ContentConfig
) -> bytes:
    """Return the encoded manifest of ``root``, verified.

    Peers are asked one after the other, the next as soon as one fails or is slow; the
    first right answer ends it.

    Raises:
        IntegrityError: a peer answered with another content's manifest, and nobody
            with the right one.
        RemoteProtocolError: likewise, with a malformed or oversized answer.
        HoldersAway: nobody who answered has it, and some could not be asked.
        Unavailable: nobody has it.
    """
    good: list[bytes] = []
    errors: list[FabricError] = []

    async def ask(peer: PeerId, failed: trio.Event) -> None:
        try:
            good.append(await _ask(rpc, root, peer, config.call_timeout_seconds))
            nursery.cancel_scope.cancel()
        except FabricError as exc:
            errors.append(exc)
            failed.set()

    async with trio.open_nursery() as nursery:
        for peer in peers:
            failed = trio.Event()
            nursery.start_soon(ask, peer, failed)
            with trio.move_on_after(config.manifest_stagger_seconds):
                await failed.wait()
    if good:
        return good[0]
    for kind in (IntegrityError, RemoteProtocolError):
        for error in errors:
            if isinstance(error, kind):
                raise error
    away = any(not isinstance(error, _NotThere) for error in errors)
    raise (HoldersAway if away else Unavailable)(
        f"none of {len(peers)} peers has the manifest of {root[:12]}",
        code="E_NO_CONTENT",
        next_step="see with `fabric status` whether its holders are connected",
    )


class _NotThere(Unavailable):
    """A peer answered that it does not hold it."""


async def _ask(rpc: Rpc, root: BlobId, peer: PeerId, timeout_seconds: float) -> bytes:
    try:
        with trio.fail_after(timeout_seconds):
            raw = await rpc.call(peer, METHOD_MANIFEST, CODEC.encode(Ask(root)))
    except trio.TooSlowError as exc:
        raise Unavailable("no answer to content.manifest") from exc
    reply = CODEC.decode_untrusted(raw)
    if not isinstance(reply, Manifest):
        raise _NotThere("the peer does not hold the manifest")
    decode_manifest_untrusted(reply.raw, root)
    return reply.raw
