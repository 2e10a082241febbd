"""The worker's main thread: commands, other workers' frames and training, in one loop.

Between two inner steps the loop handles everything that has arrived; when there is
nothing to compute it sleeps on the inbox. So all state has one owner and no locks.
"""

from __future__ import annotations

import queue
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fabric.bulk.certificates import Credentials, job_credentials
from fabric.core.digest import BLOCK_BYTES
from fabric.core.errors import FabricError, IntegrityError, Unavailable
from fabric.core.ids import PeerId
from fabric.jobs.messages import RoundReport, StateHeld
from training.messages import (
    ApplyGeneration,
    Broken,
    Certified,
    Certify,
    Command,
    Configure,
    Connect,
    Contribution,
    Decide,
    Event,
    Failed,
    Finished,
    Held,
    LinkMoved,
    Numbers,
    RoundReported,
    SaveCheckpoint,
    Saved,
    SaveFailed,
    StateBlock,
    StateBlockRequest,
    StateList,
    StateListRequest,
    Stop,
    max_exchange_payload,
)
from training.worker.exchange import Exchange, Lost, Opened, Received
from training.worker.fetch import StateFetch
from training.worker.rounds import Piece, Rounds, StepReady
from training.worker.save import save_checkpoint
from training.worker.trainer import Trainer

INBOX_ITEMS = 64
"""At most this many received payloads wait for the main thread."""
LINK_REPORT_SECONDS = 1.0
"""Period of byte counts to the daemon."""
MAX_PENDING_REQUESTS = 64
"""State requests of one peer kept until there is a way to answer."""


@dataclass(frozen=True)
class Commanded:
    """A command from the daemon, with its descriptors."""

    command: Command
    fds: tuple[int, ...]


@dataclass(frozen=True)
class DaemonGone:
    """The link ended: nobody is left to work for."""


InboxItem = Commanded | DaemonGone | Opened | Received | Lost
Inbox = queue.Queue[InboxItem]


class Participant:
    """One worker's part in one job.

    Args:
        inbox: Everything that happens, from all threads.
        tell: Sends an event to the daemon.
        configure: The job.
        key_pem: Private key of this worker's job certificates.
    """

    def __init__(
        self,
        inbox: Inbox,
        tell: Callable[[Event], None],
        configure: Configure,
        key_pem: bytes,
    ) -> None:
        self._inbox = inbox
        self._tell = tell
        self._spec = configure.spec
        self._me = PeerId(configure.peer)
        self._key_pem = key_pem
        self._credentials: dict[bytes, Credentials] = {}
        self._patience = configure.spec.fault.patience_seconds
        self._trainer = Trainer(configure.spec, configure.peer)
        self._rounds = Rounds(configure.job, self._me)
        num_blocks = -(-self._trainer.state_bytes // BLOCK_BYTES)
        self._exchange = Exchange(
            inbox,
            max_payload=max_exchange_payload(
                self._trainer.contribution_bytes, num_blocks
            ),
            stall_seconds=max(self._patience, 1.0),
        )
        self._fetch: StateFetch | None = None
        self._pending: dict[PeerId, list[StateListRequest | StateBlockRequest]] = {}
        self._distrusted: set[PeerId] = set()
        self._reported: RoundReport | None = None
        self._previous: tuple[int, Piece] | None = None
        self._next_link_report = 0.0
        self._total_tokens = 0
        self._stopped = False

    def run(self) -> None:
        """Work until Stop, or until the daemon is gone.

        Raises:
            FabricError: this worker cannot go on.
        """
        while not self._stopped:
            self._drain()
            if self._rounds.wants_training and self._trainer.inner_step():
                self._offer_contribution()
            self._advance()
            self._fetch_more()
            self._report_round()
            self._report_links(time.monotonic())
        self._report_links(float("inf"))
        self._exchange.close()

    def _drain(self) -> None:
        """Handle all that waits; with nothing to compute, wait for one item first."""
        wait = 0.0 if self._rounds.wants_training else LINK_REPORT_SECONDS
        if self._fetch and (deadline := self._fetch.next_deadline()) is not None:
            wait = min(wait, max(0.0, deadline - time.monotonic()))
        try:
            item = self._inbox.get(timeout=wait) if wait else self._inbox.get_nowait()
            self._handle(item)
            while not self._stopped:
                self._handle(self._inbox.get_nowait())
        except queue.Empty:
            return

    def _handle(self, item: InboxItem) -> None:
        match item:
            case Commanded(command, fds):
                self._obey(command, fds)
            case DaemonGone():
                self._stopped = True
            case Opened(peer, outgoing):
                self._opened(item, peer, outgoing)
            case Received(peer, meta, payload):
                if peer not in self._distrusted:
                    self._received(peer, meta, payload)
            case Lost(peer, outgoing, error):
                self._lost(peer, outgoing, error)

    def _obey(self, command: Command, fds: tuple[int, ...]) -> None:
        match command:
            case Certify(statement):
                credentials = job_credentials(self._key_pem, statement)
                self._credentials[credentials.der] = credentials
                self._tell(Certified(credentials.der))
            case ApplyGeneration():
                self._apply(command)
            case Connect():
                self._connect(command, fds)
            case Decide(decision):
                self._rounds.decide(decision)
            case SaveCheckpoint(directory):
                self._save(Path(directory))
            case Stop():
                self._stopped = True
            case Configure():
                raise Unavailable("a worker is configured once", code="E_BUG")

    # -- generations and connections ------------------------------------------------

    def _apply(self, command: ApplyGeneration) -> None:
        generation = command.generation
        if not self._rounds.apply(generation):
            return
        self._reported = None
        self._exchange.keep(self._rounds.others)
        self._fetch = None
        wanted = self._rounds.missing_state()
        if wanted is None:
            return
        if wanted.base_round == 0 and not wanted.state_digest:
            self._hold(wanted.base_round, self._trainer.hold_initial())
            return
        if self._trainer.hold_kept(wanted.state_digest):
            self._hold(wanted.base_round, wanted.state_digest)
            return
        self._fetch = StateFetch(
            wanted.state_digest,
            self._trainer.state_bytes,
            [PeerId(p) for p in wanted.sources if p != self._me],
            patience_seconds=self._patience,
        )
        for peer in self._rounds.others:
            self._note_source(peer)

    def _connect(self, connect: Connect, fds: tuple[int, ...]) -> None:
        sock = socket.socket(fileno=fds[0])
        if connect.peer not in self._rounds.others or connect.peer in self._distrusted:
            sock.close()
            return
        self._exchange.add(
            connect, sock, self._credentials.get(connect.own_certificate)
        )

    def _opened(self, event: Opened, peer: PeerId, outgoing: bool) -> None:
        self._exchange.opened(event)
        if self._both_ways(peer):
            self._rounds.connection_restored(peer)
            self._note_source(peer)
        if not outgoing:
            return
        generation = self._rounds.generation
        if self._previous and generation and self._previous[0] >= generation.base_round:
            self._contribute(peer, *self._previous)
        if self._rounds.own:
            self._contribute(peer, self._rounds.round, self._rounds.own)
        for request in self._pending.pop(peer, []):
            self._serve(peer, request)

    def _lost(self, peer: PeerId, outgoing: bool, error: FabricError) -> None:
        if not self._exchange.forget(peer, outgoing=outgoing):
            return
        if self._fetch:
            self._fetch.source_lost(peer)
        if peer in self._rounds.others:
            self._rounds.connection_lost(peer)
            self._tell(Broken(peer, outgoing, error.code, error.reason[:500]))

    def _both_ways(self, peer: PeerId) -> bool:
        return self._exchange.has(peer, outgoing=True) and self._exchange.has(
            peer, outgoing=False
        )

    def _note_source(self, peer: PeerId) -> None:
        if self._fetch and self._both_ways(peer):
            self._fetch.source_ready(peer)

    def _distrust(self, peer: PeerId, error: IntegrityError) -> None:
        """Never take anything from ``peer`` again: its bytes were not what they say."""
        self._distrusted.add(peer)
        self._exchange.hang_up(peer)
        self._rounds.connection_lost(peer)
        self._tell(Broken(peer, False, error.code, error.reason[:500]))

    # -- frames ---------------------------------------------------------------------

    def _received(self, peer: PeerId, meta: object, payload: bytearray) -> None:
        try:
            match meta:
                case Contribution(round_number, tokens):
                    self._trainer.check(payload)
                    self._rounds.received(peer, round_number, Piece(tokens, payload))
                case StateListRequest() | StateBlockRequest():
                    self._serve(peer, meta)
                case StateList(name) if self._fetch and self._fetch.name == name:
                    self._fetch.list_received(peer, payload)
                case StateBlock(name, index) if self._fetch and (
                    self._fetch.name == name
                ):
                    self._fetch.block_received(peer, index, payload)
        except IntegrityError as exc:
            self._distrust(peer, exc)

    def _serve(
        self, peer: PeerId, request: StateListRequest | StateBlockRequest
    ) -> None:
        """Answer a newcomer; an empty payload says that we do not hold that state."""
        if not self._exchange.has(peer, outgoing=True):
            waiting = self._pending.setdefault(peer, [])
            if peer in self._rounds.others and len(waiting) < MAX_PENDING_REQUESTS:
                waiting.append(request)
            return
        served = self._trainer.served(request.digest)
        match request:
            case StateListRequest(name):
                listing = served.listing if served else b""
                self._exchange.send(peer, StateList(name), listing)
            case StateBlockRequest(name, index):
                block = served.block(index) if served else b""
                self._exchange.send(peer, StateBlock(name, index), block)

    def _fetch_more(self) -> None:
        fetch, wanted = self._fetch, self._rounds.missing_state()
        if fetch is None or wanted is None:
            return
        if fetch.hopeless:
            raise Unavailable("no source gave the state", code="E_NO_STATE")
        for peer, request in fetch.requests(time.monotonic()):
            if not self._exchange.send(peer, request):
                fetch.source_lost(peer)
        if fetch.done:
            self._fetch = None
            shares = {f"state_bytes:{p}": n for p, n in fetch.received_from.items()}
            self._tell(Numbers({"state_sources": len(shares), **shares}))
            name = self._trainer.hold_received(wanted.base_round, fetch.data)
            self._hold(wanted.base_round, name)

    # -- rounds ---------------------------------------------------------------------

    def _hold(self, round_number: int, name: str) -> None:
        held = self._rounds.hold(round_number, name)
        self._tell(Held(held))
        if self._evaluates(round_number) or self._rounds.last:
            self._evaluate(held)

    def _evaluates(self, round_number: int) -> bool:
        """Return whether it is our turn: one evaluation of equal states is enough."""
        generation = self._rounds.generation
        if generation is None or not generation.participants:
            return False
        turn = round_number % len(generation.participants)
        return generation.participants[turn] == self._me

    def _evaluate(self, held: StateHeld) -> None:
        loss = self._trainer.evaluate()
        self._tell(
            Held(StateHeld(held.job, held.counter, held.round, held.state_digest, loss))
        )
        self._tell(
            Numbers(
                {
                    "round": held.round,
                    "validation_loss": loss,
                    "unigram_entropy": self._trainer.unigram_entropy,
                }
            )
        )

    def _offer_contribution(self) -> None:
        piece, loss = self._trainer.contribution()
        self._rounds.own_ready(piece, loss)
        self._total_tokens += piece.tokens
        for peer in sorted(self._rounds.others):
            self._contribute(peer, self._rounds.round, piece)
        self._tell(
            Numbers(
                {
                    "round": self._rounds.round,
                    "loss": loss,
                    "tokens": self._total_tokens,
                    "tokens_per_second": self._trainer.tokens_per_second,
                }
            )
        )

    def _contribute(self, peer: PeerId, round_number: int, piece: Piece) -> None:
        self._exchange.send(
            peer, Contribution(round_number, piece.tokens), piece.payload
        )

    def _advance(self) -> None:
        while ready := self._rounds.step_ready():
            self._step(ready)

    def _step(self, ready: StepReady) -> None:
        finished = self._rounds.round
        if self._rounds.own:
            self._previous = (finished, self._rounds.own)
        name = self._trainer.outer_step(ready)
        self._rounds.last = ready.last
        self._hold(finished + 1, name)
        if ready.last:
            self._tell(
                Finished(
                    {
                        "rounds": finished + 1,
                        "state_digest": name,
                        "parameter_digest": self._trainer.parameter_digest(),
                        "validation_loss": self._trainer.evaluate(),
                        "unigram_entropy": self._trainer.unigram_entropy,
                        "tokens": self._total_tokens,
                    }
                )
            )

    # -- reports --------------------------------------------------------------------

    def _report_round(self) -> None:
        report = self._rounds.report()
        if report is not None and report != self._reported:
            self._reported = report
            self._tell(RoundReported(report))

    def _report_links(self, now: float) -> None:
        if now < self._next_link_report:
            return
        self._next_link_report = now + LINK_REPORT_SECONDS
        for (peer, path), moved in self._exchange.link_bytes().items():
            self._tell(LinkMoved(peer, path, moved.sent, moved.received))

    def _save(self, directory: Path) -> None:
        state = self._trainer.state
        try:
            if state is None:
                raise Unavailable("no state to save yet", code="E_NO_STATE")
            saved = save_checkpoint(directory, self._spec, self._trainer.engine, state)
        except (FabricError, OSError) as exc:
            code = exc.code if isinstance(exc, FabricError) else "E_DISK"
            self._tell(SaveFailed(str(directory), code, str(exc)[:500]))
            return
        self._tell(Saved(str(directory), saved.root, state.round, saved.size_bytes))


def failure(error: FabricError) -> Failed:
    """Return the last event of a worker that cannot go on."""
    return Failed(error.code, error.reason[:500])
