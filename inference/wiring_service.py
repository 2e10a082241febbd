"""Connect one stage to its neighbours: certificate, layers, a socket each way.

Every stage has one outgoing and one incoming channel: activations to the next stage,
tokens from the last back to the first. Which peer dials follows from that, so no two
peers ever dial each other.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

import trio

from fabric.bulk.certificates import (
    MAX_JOB_LIFE_SECONDS,
    JobStatement,
    issue_job_certificate,
)
from fabric.core.errors import (
    IntegrityError,
    RemoteProtocolError,
    RemoteRefused,
    Unavailable,
)
from fabric.core.ids import JobId, PeerId
from fabric.core.signing import Signer
from fabric.net.paths_api import Paths, Purpose, WorkerSocket, WorkerSockets
from inference.worker_messages import (
    Assign,
    Attach,
    Attached,
    Certified,
    Certify,
    ChannelLost,
    ChannelName,
    Command,
    Loaded,
    WorkerKey,
)

T = TypeVar("T")
ChannelKey = tuple[int, ChannelName, bool]

_LOAD_SECONDS = 600.0
"""Longest time to read a stage's layers from disk."""
_START_SECONDS = 60.0
"""Longest time for a worker to import torch and make its key."""
_OPEN_SECONDS = 10.0
_RETRY_SECONDS = (0.1, 0.2, 0.5, 1.0, 2.0)

SendCommand = Callable[[Command, int | None], Awaitable[None]]
"""Sends a command to the worker, with a descriptor."""


@dataclass(frozen=True)
class Place:
    """Our place in a generation's chain."""

    counter: int
    peers: tuple[PeerId, ...]
    stage: int

    @property
    def outgoing(self) -> tuple[PeerId, ChannelName]:
        """Whom we dial, and for what."""
        last = self.stage == len(self.peers) - 1
        peer = self.peers[(self.stage + 1) % len(self.peers)]
        return peer, "tokens" if last else "activations"

    @property
    def incoming(self) -> tuple[PeerId, ChannelName]:
        """Who dials us, and for what."""
        return self.peers[self.stage - 1], "activations" if self.stage else "tokens"


class Wiring:
    """What is known of the worker's key, layers and channels; one per worker.

    Args:
        job: The job.
        peer_id: This peer.
        signer: Signs the worker's certificates.
        paths: Opens sockets.
        now: Unix seconds.
        send: Sends a command to the worker.
        on_wait: Told why a connection is not there yet.
    """

    def __init__(
        self,
        job: JobId,
        peer_id: PeerId,
        signer: Signer,
        paths: Paths,
        now: Callable[[], float],
        send: SendCommand,
        on_wait: Callable[[str], None],
    ) -> None:
        self._job = job
        self._peer_id = peer_id
        self._signer = signer
        self._paths = paths
        self._now = now
        self._send = send
        self._on_wait = on_wait
        self._heard = trio.Event()
        self._spki = b""
        self._certificate = b""
        self._attached: set[ChannelKey] = set()
        self._lost: set[ChannelKey] = set()
        self._sockets: WorkerSockets | None = None
        self.loaded: Loaded | None = None

    def close(self) -> None:
        """Refuse further connections."""
        if self._sockets is not None:
            self._sockets.close()

    def on_event(self, event: WorkerKey | Certified | Loaded | Attached) -> None:
        """Take in what the worker says about its key, layers and channels."""
        match event:
            case WorkerKey():
                self._spki = event.spki
            case Certified():
                self._certificate = event.der
            case Loaded():
                self.loaded = event
            case Attached():
                current = {key for key in self._attached if key[0] == event.epoch}
                key = (event.epoch, event.channel, event.outgoing)
                self._attached = current | {key}
        self._hear()

    def on_lost(self, event: ChannelLost) -> bool:
        """Take in the loss of a channel; return whether it had been in use."""
        key = (event.epoch, event.channel, event.outgoing)
        self._lost.add(key)
        self._hear()
        return key in self._attached

    def _hear(self) -> None:
        heard, self._heard = self._heard, trio.Event()
        heard.set()

    async def connect(self, place: Place, assign: Assign) -> Loaded:
        """Have the worker loaded and connected; waits for slow neighbours for ever.

        After a cancellation the worker is in between: connect it again.

        Raises:
            Unavailable: the worker is gone or silent.
        """
        await self._certify(place.counter)
        sockets = self._expect(place)
        await self._send(assign, None)
        loaded = await self._until(
            lambda: self._loaded_for(place.counter), _LOAD_SECONDS
        )
        if len(place.peers) > 1:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._dial, place)
                nursery.start_soon(self._accept, sockets, place)
        return loaded

    async def _certify(self, counter: int) -> None:
        spki = await self._until(lambda: self._spki or None, _START_SECONDS)
        now = self._now()
        expires = int(now) + MAX_JOB_LIFE_SECONDS
        statement = JobStatement(self._job, counter, spki, int(now), expires)
        self._certificate = b""
        signed = issue_job_certificate(self._signer, statement, now)
        await self._send(Certify(signed), None)
        await self._until(lambda: self._certificate or None, _START_SECONDS)

    def _expect(self, place: Place) -> WorkerSockets:
        allowed = frozenset(place.peers) - {self._peer_id}
        if self._sockets is None:
            self._sockets = self._paths.expect(self._job, self._certificate, allowed)
        self._sockets.allow(allowed, min_counter=place.counter)
        self._sockets.renew(self._certificate)
        return self._sockets

    async def _dial(self, place: Place) -> None:
        peer, channel = place.outgoing
        purpose = Purpose(self._job, place.counter, channel)
        attempt = 0
        while True:
            found = await self._try_open(peer, purpose)
            if found is not None and await self._attach(
                found, place.counter, channel, outgoing=True
            ):
                return
            # It may be a little behind us, and show a certificate that it is about to
            # replace; a new generation ends this loop.
            await trio.sleep(_RETRY_SECONDS[min(attempt, len(_RETRY_SECONDS) - 1)])
            attempt += 1

    async def _try_open(self, peer: PeerId, purpose: Purpose) -> WorkerSocket | None:
        try:
            with trio.fail_after(_OPEN_SECONDS):
                return await self._paths.open(peer, purpose, self._certificate)
        except (
            Unavailable,
            RemoteRefused,
            RemoteProtocolError,
            IntegrityError,
        ) as exc:
            # A neighbour that lies must not end our worker: the chain waits, and
            # says for whom.
            self._on_wait(f"{purpose.channel}: {exc.reason}")
        except trio.TooSlowError:
            self._on_wait(f"{purpose.channel}: no answer")
        return None

    async def _accept(self, sockets: WorkerSockets, place: Place) -> None:
        peer, channel = place.incoming
        wanted = (peer, place.counter, channel)
        while True:
            found = await sockets.accept()
            purpose = found.purpose
            if (found.peer, purpose.counter, purpose.channel) != wanted:
                found.sock.close()
            elif await self._attach(found, place.counter, channel, outgoing=False):
                return

    async def _attach(
        self, found: WorkerSocket, counter: int, channel: ChannelName, *, outgoing: bool
    ) -> bool:
        """Hand a socket to the worker; return whether its handshake succeeded."""
        server = not found.initiator
        attach = Attach(counter, channel, outgoing, server, found.peer_certificate)
        key = (counter, channel, outgoing)
        self._lost.discard(key)
        with found.sock:
            await self._send(attach, found.sock.fileno())
        # The handshake has a deadline of its own in the worker, which then says lost.
        await self._until(lambda: key in self._attached | self._lost or None, None)
        return key in self._attached

    def _loaded_for(self, counter: int) -> Loaded | None:
        loaded = self.loaded
        return loaded if loaded is not None and loaded.epoch == counter else None

    async def _until(self, ready: Callable[[], T | None], seconds: float | None) -> T:
        """Return the first value of ``ready`` that is not None."""
        with trio.move_on_after(float("inf") if seconds is None else seconds):
            while True:
                value = ready()
                if value is not None:
                    return value
                await self._heard.wait()
        raise Unavailable("the stage's worker is silent", code="E_WORKER")
