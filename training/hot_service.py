"""Keeps the newest states of jobs in memory, here and on one buddy elsewhere.

    worker --writes once--> file in memory <--reads-- the next worker, after a death
                                |
                                '--pulled by--> the buddy's file in memory

In a fully replicated job every participant holds the whole state, so participants on
two machines are each other's buddies and nothing is moved. Bytes move where all
participants share one failure domain and a member outside could keep a copy.

Source: Wang et al., "Gemini" (SOSP 2023), section 4: placement in groups.
"""

from __future__ import annotations

import io
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import trio

from checkpoints.mesh.placement import Domains, missing_copies
from fabric.core.digest import rendezvous_order
from fabric.core.errors import (
    FabricError,
    IntegrityError,
    RemoteProtocolError,
    ResourceExhausted,
    Unavailable,
)
from fabric.core.ids import JobId, PeerId, short
from fabric.core.signing import Signer
from fabric.jobs.promises import Held
from fabric.jobs.restoration import Restored
from fabric.jobs.spec import JobSpec
from fabric.net.paths_api import BulkPaths
from fabric.net.rpc_api import Rpc
from training.hot_messages import (
    BULK_SERVICE,
    CODEC,
    ENVELOPE,
    METHOD_ASK,
    METHOD_KEEP,
    HotAsk,
    HotClaim,
    HotHeld,
    HotKeep,
    HotKept,
    Message,
    check_about,
    open_claim_untrusted,
    sign_claim,
)
from training.hot_store import HotState, HotStore
from training.hot_transfer import pull, serve_hot
from training.resumption import state_bytes
from training.saved_states import SavedStates, copy_state

log = logging.getLogger(__name__)

COPIES = 2
ASK_SECONDS = 5.0
"""Longest wait for what the rest keeps, once somebody keeps or has a state."""
LAST_SECONDS = 30.0
"""Longest wait while nobody does: without, a job begins anew."""
RETRY_SECONDS = 0.3
PULL_SECONDS = 300.0
"""Longest transfer of one state; a newer one replaces it soon after."""
MAX_ASKED = 32
"""Members asked what they keep: the participants, then others."""


@dataclass(frozen=True)
class HotPorts:
    """What states in memory need of the node.

    Attributes:
        rpc: Small questions.
        paths: Bulk connections.
        domains: Who is there, and where.
        spec_of: The spec of a job that is not over, or None.
        works: Whether a worker here holds a state of a job.
        saved: Finds and brings checkpoints of jobs.
    """

    rpc: Rpc
    paths: BulkPaths
    domains: Callable[[], Domains]
    spec_of: Callable[[JobId], JobSpec | None]
    works: Callable[[JobId], bool]
    saved: SavedStates


class HotService:
    """States kept by this peer: implements :class:`fabric.jobs.ports.HotStates`.

    Args:
        signer: This peer.
        store: Where they are.
        ports: The node.
    """

    def __init__(self, signer: Signer, store: HotStore, ports: HotPorts) -> None:
        self._signer, self._own = signer, signer.peer_id
        self._store, self._ports = store, ports
        self._to_push: dict[JobId, tuple[HotState, tuple[PeerId, ...]]] = {}
        self._wake = trio.Event()

    async def run(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Answer peers and bring states to buddies until cancelled."""
        self._ports.rpc.register_async(METHOD_ASK, self._on_ask)
        self._ports.rpc.register_async(METHOD_KEEP, self._on_keep)
        self._ports.paths.serve_bulk(BULK_SERVICE, serve_hot(self._store))
        task_status.started()
        for job in self._store.jobs():
            if self._ports.spec_of(job) is None:
                await self.forget(job)
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            while self._to_push:
                job = next(iter(self._to_push))
                await self._push(*self._to_push.pop(job))

    # -- for the runner of a job

    async def begin(self, state: HotState, spec: JobSpec) -> io.FileIO | None:
        """Return a file for a worker to write ``state`` into; None: no room for it."""
        try:
            return await trio.to_thread.run_sync(
                self._store.create, state, state_bytes(spec.model)
            )
        except ResourceExhausted as exc:
            log.info("hot.refused job=%s %s", state.job[:8], exc.reason)
            return None

    async def finish(
        self, state: HotState, spec: JobSpec, participants: tuple[PeerId, ...]
    ) -> bool:
        """Keep what the worker wrote and have a buddy do so; False: damaged."""
        claim = HotClaim(state.job, state.round, state.digest, state_bytes(spec.model))
        raw = ENVELOPE.encode(sign_claim(self._signer, claim))
        try:
            await trio.to_thread.run_sync(self._store.commit, state, raw)
        except IntegrityError as exc:
            log.warning("hot.damaged job=%s %s", state.job[:8], exc.reason)
            return False
        self._to_push[state.job] = (state, participants)
        self._wake.set()
        return True

    def abort(self, state: HotState) -> None:
        """The worker did not write it."""
        self._store.abort(state)

    def open(self, job: JobId, digest: str) -> tuple[HotState, io.FileIO] | None:
        """Return the kept state called ``digest`` and its file, if there is one."""
        state = self._store.find(digest)
        if state is None or state.job != job:
            return None
        try:
            return state, self._store.open(state)
        except Unavailable:
            return None

    def damaged(self, digest: str) -> None:
        """A worker found that the state is not what it should be."""
        if (state := self._store.find(digest)) is not None:
            self._store.drop(state)

    # -- for the jobs service

    def newest(self, job: JobId) -> Held | None:
        """Return the newest state of ``job`` kept here."""
        kept = self._store.kept(job)
        return Held(kept[-1].round, kept[-1].digest, has_state=True) if kept else None

    async def recall(self, job: JobId, participants: tuple[PeerId, ...]) -> Held | None:
        """Return the newest state of ``job`` that is kept here or can be got.

        Nothing is got while some participant's worker holds a state: that one is newer.
        """
        if (held := self.newest(job)) is not None:
            return held
        answers = await self._ask_all(job, participants)
        if any(answer.works for answer in answers.values()):
            return None
        for claim, keepers in _best_first(job, answers, participants):
            for peer in keepers:
                if await self._pull(peer, claim, answers[peer]):
                    return self.newest(job)
        return None

    def checkpoint(
        self, job: JobId, spec: JobSpec, participants: tuple[PeerId, ...]
    ) -> int:
        """Return the round of the newest checkpoint of ``job``; 0: there is none."""
        return max(self._ports.saved.rounds(job, spec, participants), default=0)

    async def restore(
        self, job: JobId, spec: JobSpec, participants: tuple[PeerId, ...]
    ) -> Restored:
        """Keep the state of the newest checkpoint of ``job`` that can be had.

        Raises:
            FabricError: no peer in reach has one, or there is no room for it.
        """
        size = state_bytes(spec.model)

        def sign(state: HotState) -> bytes:
            claim = HotClaim(job, state.round, state.digest, size)
            return ENVELOPE.encode(sign_claim(self._signer, claim))

        async with self._ports.saved.opened(job, spec, participants) as saved:
            state = await trio.to_thread.run_sync(
                self._store.add,
                job,
                saved.round,
                size,
                partial(copy_state, saved.path, spec.model),
                sign,
            )
        held = Held(state.round, state.digest, has_state=True)
        return Restored(held, saved.root)

    async def forget(self, job: JobId) -> None:
        """Keep nothing of ``job``: it is over."""
        self._to_push.pop(job, None)
        await trio.to_thread.run_sync(self._store.forget, job)

    # -- buddies

    async def _push(self, state: HotState, participants: tuple[PeerId, ...]) -> None:
        """Have a buddy outside keep ``state``, if the participants are not enough."""
        sender = rendezvous_order(f"{state.job}/hot".encode(), participants)[:1]
        if sender != [self._own]:
            return
        domains = self._ports.domains()
        there = [peer for peer in participants if peer in domains]
        others = set(domains) - set(participants)
        for buddy in missing_copies(state.job, there, others, domains, COPIES):
            try:
                claim = ENVELOPE.decode_untrusted(
                    await trio.to_thread.run_sync(self._store.claim, state)
                )
                with trio.fail_after(PULL_SECONDS):
                    answer = await self._call(buddy, METHOD_KEEP, HotKeep(claim))
            except (FabricError, OSError, trio.TooSlowError) as exc:
                log.info("hot.no_buddy peer=%s %r", short(buddy), exc)
                continue
            if isinstance(answer, HotKept) and answer.refused:
                log.info("hot.no_buddy peer=%s %s", short(buddy), answer.refused)

    async def _on_keep(self, sender: PeerId, raw: bytes) -> bytes:
        message = CODEC.decode_untrusted(raw)
        if not isinstance(message, HotKeep):
            raise RemoteProtocolError(f"{type(message).__name__} instead of HotKeep")
        signer, claim = open_claim_untrusted(message.claim)
        spec = self._ports.spec_of(claim.job)
        if signer != sender or spec is None:
            return CODEC.encode(HotKept("no such job runs, as far as I know"))
        if claim.size != state_bytes(spec.model):
            return CODEC.encode(HotKept("a state of that job has another size"))
        held = HotHeld((message.claim,))
        kept = await self._pull(sender, claim, held)
        return CODEC.encode(HotKept("" if kept else "no room, or it did not arrive"))

    # -- what others keep

    async def _ask_all(
        self, job: JobId, participants: Sequence[PeerId]
    ) -> dict[PeerId, HotHeld]:
        """Ask participants and other members until all answered or the time is up."""
        answers: dict[PeerId, HotHeld] = {}
        others = sorted(self._ports.domains().keys() - set(participants))
        order = [p for p in (*participants, *others) if p != self._own][:MAX_ASKED]

        async def ask(peer: PeerId) -> None:
            while True:  # we may have just started: connections come one by one
                try:
                    answer = await self._call(peer, METHOD_ASK, HotAsk(job))
                except FabricError:
                    await trio.sleep(RETRY_SECONDS)
                    continue
                if isinstance(answer, HotHeld):
                    answers[peer] = answer
                    if answer.claims or answer.works:
                        wait.deadline = min(wait.deadline, enough)
                return

        enough = trio.current_time() + ASK_SECONDS
        with trio.move_on_after(LAST_SECONDS) as wait:
            async with trio.open_nursery() as nursery:
                for peer in order:
                    nursery.start_soon(ask, peer)
        return answers

    async def _on_ask(self, sender: PeerId, raw: bytes) -> bytes:
        message = CODEC.decode_untrusted(raw)
        if not isinstance(message, HotAsk):
            raise RemoteProtocolError(f"{type(message).__name__} instead of HotAsk")
        claims = []
        for state in self._store.kept(message.job):
            try:
                raw_claim = await trio.to_thread.run_sync(self._store.claim, state)
            except OSError:
                continue  # replaced meanwhile
            claims.append(ENVELOPE.decode_untrusted(raw_claim))
        works = self._ports.works(message.job)
        return CODEC.encode(HotHeld(tuple(claims), works))

    async def _pull(self, peer: PeerId, claim: HotClaim, held: HotHeld) -> bool:
        """Have the claimed state here from ``peer``; return whether it is."""
        if self._store.find(claim.digest) is not None:
            return True
        state = HotState(claim.job, claim.round, claim.digest)
        envelope = next(e for e in held.claims if open_claim_untrusted(e)[1] == claim)
        try:
            with trio.fail_after(PULL_SECONDS):
                file = await trio.to_thread.run_sync(
                    self._store.create, state, claim.size
                )
                try:
                    with file:
                        sock = await self._ports.paths.dial_bulk(peer, BULK_SERVICE)
                        await trio.to_thread.run_sync(
                            pull, sock, claim.digest, claim.size, file.fileno()
                        )
                    raw = ENVELOPE.encode(envelope)
                    await trio.to_thread.run_sync(self._store.commit, state, raw)
                finally:
                    self._store.abort(state)
        except (FabricError, OSError, trio.TooSlowError) as exc:
            log.info("hot.not_pulled peer=%s %r", short(peer), exc)
            return False
        return True

    async def _call(self, peer: PeerId, method: str, message: Message) -> Message:
        return CODEC.decode_untrusted(
            await self._ports.rpc.call(peer, method, CODEC.encode(message))
        )


def _best_first(
    job: JobId, answers: dict[PeerId, HotHeld], participants: Sequence[PeerId]
) -> list[tuple[HotClaim, list[PeerId]]]:
    """Return the claims of participants and who keeps each: the newest, then agreed."""
    keepers: dict[HotClaim, list[PeerId]] = {}
    votes: Counter[HotClaim] = Counter()
    for peer, held in sorted(answers.items()):
        for envelope in held.claims:
            try:
                signer, claim = open_claim_untrusted(envelope)
                check_about(claim, job)
            except FabricError:
                continue
            if signer in participants:
                keepers.setdefault(claim, []).append(peer)
                votes[claim] += 1
    order = sorted(keepers, key=lambda c: (c.round, votes[c], c.digest), reverse=True)
    return [(claim, keepers[claim]) for claim in order]
