"""The worker's main thread: commands, other workers' frames and training, in one loop.

Between two inner steps the loop handles everything that has arrived; when there is
nothing to compute it sleeps on the inbox. So all state has one owner and no locks.
"""

from __future__ import annotations

import queue
import socket
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from fabric.bulk.certificates import Credentials, job_credentials
from fabric.core.digest import BLOCK_BYTES, hex_digest
from fabric.core.errors import FabricError, IntegrityError, Unavailable
from fabric.core.ids import PeerId
from fabric.jobs.messages import Generation, RoundReport, StateHeld
from training.messages import (
    ApplyGeneration,
    Broken,
    Certified,
    Certify,
    Command,
    Configure,
    Connect,
    Contribution,
    ContributionStands,
    Decide,
    Event,
    ExchangeMeta,
    Finished,
    Held,
    LinkMoved,
    LoadHot,
    Numbers,
    RoundReported,
    SaveCheckpoint,
    StateBlock,
    StateBlockRequest,
    StateList,
    StateListRequest,
    Stop,
    WriteHot,
    max_exchange_payload,
)
from training.worker.exchange import Exchange, Lost, Opened, Received
from training.worker.inbox import Commanded, DaemonGone, Inbox, InboxItem
from training.worker.kept import KeptStates
from training.worker.rounds import Piece, Rounds
from training.worker.states import StateExchange
from training.worker.trainer import Trainer

LINK_REPORT_SECONDS = 1.0
"""Period of byte counts to the daemon."""


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
        resume = Path(configure.resume) if configure.resume else None
        self._trainer = Trainer(configure.spec, configure.peer, resume)
        self._kept = KeptStates(configure.spec, self._trainer, tell)
        self._rounds = Rounds(
            configure.job, self._me, configure.spec.train.outer.rounds
        )
        num_blocks = -(-self._trainer.state_bytes // BLOCK_BYTES)
        self._exchange = Exchange(
            inbox,
            max_payload=max_exchange_payload(
                self._trainer.contribution_bytes, num_blocks
            ),
            stall_seconds=max(self._patience, 1.0),
        )
        self._states = StateExchange(
            self._me,
            self._exchange,
            self._trainer,
            tell,
            patience_seconds=self._patience,
        )
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
            self._take_state()
            self._report_round()
            if time.monotonic() >= self._next_link_report:
                self._report_links()
        self._report_links()
        self._exchange.close()

    def _drain(self) -> None:
        """Handle all that waits; with nothing to compute, wait for one item first."""
        wait = 0.0 if self._rounds.wants_training else LINK_REPORT_SECONDS
        if (seconds := self._states.seconds_to_deadline()) is not None:
            wait = min(wait, seconds)
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
            case SaveCheckpoint(directory, at):
                self._kept.save(Path(directory), at)
            case WriteHot(digest):
                self._kept.write_hot(digest, fds[0])
            case LoadHot(at, digest):
                self._kept.load_hot(at, digest, fds[0])
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
        self._states.cancel()
        if self._rounds.held is not None:
            self._tell(Held(self._rounds.held))
            self._vouch(generation.counter)
        elif self._rounds.missing_state() is not None:
            self._get_state(generation)

    def _vouch(self, counter: int) -> None:
        """Say that what we contributed in an earlier epoch stands in this one."""
        if own := self._rounds.own:
            stands = ContributionStands(counter, self._rounds.round, own.name)
            for peer in self._rounds.others:
                self._exchange.send(peer, stands)

    def _get_state(self, generation: Generation) -> None:
        digest = generation.state_digest
        self._trainer.steer(generation.settings)  # those who hold the state know them
        if generation.base_round == self._trainer.first_round and not digest:
            self._start_fresh(generation.base_round)
        elif self._trainer.hold_kept(digest):
            self._hold(generation.base_round, digest)
        else:
            self._states.begin(generation)

    def _start_fresh(self, first_round: int) -> None:
        if self._spec.resume:
            digest = self._trainer.initial_digest()
            self._tell(Numbers({"resumed_round": first_round, "resumed_state": digest}))
        self._hold(first_round, self._trainer.hold_initial())

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
        if self._exchange.both_ways(peer):
            self._rounds.connection_restored(peer)
        self._states.connected(peer)
        generation = self._rounds.generation
        if not outgoing or generation is None:
            return
        if self._previous and self._previous[0] >= generation.base_round:
            self._contribute(peer, *self._previous)
        if self._rounds.own:
            self._contribute(peer, self._rounds.round, self._rounds.own)

    def _lost(self, peer: PeerId, outgoing: bool, error: FabricError) -> None:
        if not self._exchange.forget(peer, outgoing=outgoing):
            return
        self._states.lost(peer)
        if peer in self._rounds.others:
            self._rounds.connection_lost(peer)
            self._tell(Broken(peer, outgoing, error.code, error.reason[:500]))

    def _distrust(self, peer: PeerId, error: IntegrityError) -> None:
        """Never take anything from ``peer`` again: its bytes were not what they say."""
        self._distrusted.add(peer)
        self._exchange.hang_up(peer)
        self._rounds.connection_lost(peer)
        self._tell(Broken(peer, False, error.code, error.reason[:500]))

    # -- frames ---------------------------------------------------------------------

    def _received(self, peer: PeerId, meta: ExchangeMeta, payload: bytearray) -> None:
        try:
            match meta:
                case Contribution(counter, number, tokens):
                    self._trainer.check(payload)
                    piece = Piece(tokens, payload, hex_digest(payload))
                    self._rounds.received(peer, counter, number, piece)
                case ContributionStands(counter, number, name):
                    self._rounds.vouched(peer, counter, number, name)
                case StateListRequest() | StateBlockRequest():
                    self._states.serve(peer, meta)
                case StateList() | StateBlock():
                    self._states.answered(peer, meta, payload)
        except IntegrityError as exc:
            self._distrust(peer, exc)

    def _take_state(self) -> None:
        wanted = self._rounds.missing_state()
        data = self._states.poll() if wanted else None
        if wanted is not None and data is not None:
            name = self._trainer.hold_received(wanted.base_round, data)
            self._hold(wanted.base_round, name)

    # -- rounds ---------------------------------------------------------------------

    def _hold(self, round_number: int, name: str) -> None:
        held = self._rounds.hold(round_number, name)
        self._tell(Held(held))
        if self._rounds.over:
            self._finish(held)
        elif self._evaluates(round_number):
            self._evaluate(held)

    def _evaluates(self, round_number: int) -> bool:
        """Return whether it is our turn: one evaluation of equal states is enough."""
        generation = self._rounds.generation
        if generation is None or not generation.participants:
            return False
        turn = round_number % len(generation.participants)
        return generation.participants[turn] == self._me

    def _evaluate(self, held: StateHeld) -> float:
        loss = self._trainer.evaluate()
        self._tell(Held(msgspec.structs.replace(held, validation_loss=loss)))
        entropy = self._trainer.unigram_entropy
        self._tell(
            Numbers(
                {
                    "round": held.round,
                    "validation_loss": loss,
                    "unigram_entropy": entropy,
                }
            )
        )
        return loss

    def _finish(self, held: StateHeld) -> None:
        self._report_links()
        self._tell(
            Finished(
                {
                    "rounds": held.round,
                    "state_digest": held.state_digest,
                    "parameter_digest": self._trainer.parameter_digest(),
                    "validation_loss": self._evaluate(held),
                    "unigram_entropy": self._trainer.unigram_entropy,
                    "worker_tokens": self._total_tokens,
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
                    "worker_tokens": self._total_tokens,
                    "tokens_per_second": self._trainer.tokens_per_second,
                }
            )
        )

    def _contribute(self, peer: PeerId, round_number: int, piece: Piece) -> None:
        assert self._rounds.generation is not None
        counter = self._rounds.generation.counter
        meta = Contribution(counter, round_number, piece.tokens)
        self._exchange.send(peer, meta, piece.payload)

    def _advance(self) -> None:
        while ready := self._rounds.step_ready():
            finished = self._rounds.round
            if self._rounds.own:
                self._previous = (finished, self._rounds.own)
            self._hold(finished + 1, self._trainer.outer_step(ready))

    # -- reports --------------------------------------------------------------------

    def _report_round(self) -> None:
        report = self._rounds.report()
        if report is not None and report != self._reported:
            self._reported = report
            self._tell(RoundReported(report))

    def _report_links(self) -> None:
        self._next_link_report = time.monotonic() + LINK_REPORT_SECONDS
        for peer, moved in self._exchange.link_bytes().items():
            path = self._exchange.path(peer)
            self._tell(LinkMoved(peer, path, moved.sent, moved.received))
