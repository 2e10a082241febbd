"""One stage of a pipeline: owns the model, its channels and, at the head, the schedule.

The main thread hears the daemon, one thread per incoming channel hears a neighbour; all
of it goes through one inbox to the engine, the only thread that touches the model. A
session has at most its prompt's chunks under way, so the inbox cannot fill up while
everyone waits for everyone.
"""

# ruff: noqa: N803, N806 - shape suffixes are capitals (legend in llama.py)

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import msgspec
import torch

from checkpoints.torch_io.tensors import byte_view
from fabric.bulk.certificates import Credentials, job_credentials, make_worker_key
from fabric.bulk.channel import BulkSender, Frame
from fabric.bulk.worker_port import WorkerPort
from fabric.core.errors import (
    LocalProtocolError,
    RemoteProtocolError,
    ResourceExhausted,
    Unavailable,
)
from inference.layers import layer_range
from inference.messages import MAX_STOP_TOKENS, Peer, SessionToken
from inference.schedule import Schedule
from inference.worker.channels import Channel, Lost, Opened, Received
from inference.worker.llama import LlamaStage
from inference.worker.pick import pick_tokens
from inference.worker.weights import open_weights
from inference.worker_messages import (
    ACTIVATIONS,
    EVENTS,
    FEEDBACK,
    KIND_ACTIVATIONS,
    KIND_CHANNELS,
    KIND_FEEDBACK,
    MAX_ROWS,
    Activations,
    Assign,
    Attach,
    Attached,
    Certified,
    Certify,
    ChannelLost,
    ChannelName,
    Command,
    Ended,
    Event,
    Feedback,
    Loaded,
    Opening,
    Pick,
    Row,
    Sampled,
    Start,
    Stop,
    WorkerKey,
)

Item = tuple[Command, tuple[int, ...]] | Opened | Received | Lost
_INBOX_ITEMS = 8192
_MAX_HELD_FRAMES = 1024
_ELEMENT_BYTES = 4


class StageEngine:
    """The state of a stage; every method but ``put`` belongs to one thread."""

    def __init__(self, port: WorkerPort) -> None:
        self._port = port
        self._inbox: queue.Queue[Item] = queue.Queue(_INBOX_ITEMS)
        self._key, spki = make_worker_key()
        self._credentials: Credentials | None = None
        self._assign: Assign | None = None
        self._stage: LlamaStage | None = None
        self._loaded: tuple[str, range, int] | None = None
        self._schedule: Schedule | None = None
        self._channels: list[Channel] = []
        self._sender: BulkSender | None = None
        self._returning = False
        # Frames that came before our own way out stood: at most what is under way.
        self._held: deque[Frame] = deque()
        self._openings: dict[int, tuple[int, Opening]] = {}
        self._tell(WorkerKey(spki))

    def put(self, item: Item) -> None:
        """Give the engine something to do; any thread."""
        self._inbox.put(item)

    def run(self) -> None:
        """Work until the process is killed."""
        while True:
            deadline = self._next_step()
            wait = None if deadline is None else max(deadline - time.monotonic(), 0)
            try:
                item = self._inbox.get(timeout=wait)
            except queue.Empty:
                pass
            else:
                self._handle(item)
                self._drain()
            self._step_if_due()

    def _drain(self) -> None:
        for _ in range(_INBOX_ITEMS):
            try:
                self._handle(self._inbox.get_nowait())
            except queue.Empty:
                return

    def _handle(self, item: Item) -> None:
        match item:
            case Opened():
                self._on_opened(item)
            case Lost():
                self._on_lost(item.attach, item.reason)
            case Received():
                if self._assign and item.epoch == self._assign.epoch:
                    self._on_frame(item.frame)
            case (command, fds):
                self._on_command(command, fds)

    def _on_command(self, command: Command, fds: Sequence[int]) -> None:
        match command:
            case Certify():
                self._credentials = job_credentials(self._key, command.statement)
                self._tell(Certified(self._credentials.der))
            case Assign():
                self._on_assign(command)
            case Attach():
                self._on_attach(command, fds)
            case Start():
                self._on_start(command)
            case Stop():
                if self._schedule and self._schedule.cancel(
                    command.session, command.reply_to, time.monotonic()
                ):
                    self._tell(Ended(command.session, command.reply_to))

    def _on_assign(self, assign: Assign) -> None:
        for channel in self._channels:
            channel.shut()
        self._channels.clear()
        self._held.clear()
        self._openings.clear()
        self._sender, self._returning = None, False
        self._assign = assign
        stage = self._load(assign)
        if assign.stage == 0:
            if self._schedule is None:
                self._schedule = Schedule(
                    assign.max_sequences, assign.max_waiting, assign.prefill_tokens
                )
            self._schedule.restart(assign.stages, time.monotonic())
            self._repeat(self._schedule)
        elif self._schedule is not None:
            lost, self._schedule = self._schedule.openings(), None
            for opening in lost:
                self._fail(opening.session, opening.reply_to)
        layers = self._loaded[1] if self._loaded else range(0)
        self._tell(
            Loaded(
                assign.epoch,
                (layers.start, layers.stop),
                stage.shape.context,
                stage.shape.vocab_size,
                stage.parameters,
            )
        )

    def _load(self, assign: Assign) -> LlamaStage:
        weights = open_weights(Path(assign.directory))
        layers = layer_range(weights.shape.num_layers, assign.stage, assign.stages)
        wanted = (assign.directory, layers, assign.max_sequences)
        if self._stage is None or wanted != self._loaded:
            self._stage = None  # free the old layers before the new ones are read
            self._stage = LlamaStage(weights, layers, assign.max_sequences)
            self._loaded = wanted
        return self._stage

    def _on_attach(self, attach: Attach, fds: Sequence[int]) -> None:
        if len(fds) != 1 or self._assign is None or self._stage is None:
            raise LocalProtocolError(f"attach with {len(fds)} descriptors")
        tokens = self._assign.prefill_tokens + self._assign.max_sequences
        self._channels.append(
            Channel(
                attach,
                fds[0],
                self._credentials,
                max_payload=tokens * self._stage.shape.hidden_size * _ELEMENT_BYTES,
                report=self.put,
            )
        )

    def _on_opened(self, opened: Opened) -> None:
        attach = opened.attach
        if self._assign is None or attach.epoch != self._assign.epoch:
            return
        if opened.sender is not None:
            self._sender = opened.sender
            while self._held:
                self._on_frame(self._held.popleft())
        elif attach.channel == "tokens":
            self._returning = True
        self._tell(Attached(attach.epoch, attach.channel, attach.outgoing))

    def _on_lost(self, attach: Attach, reason: str) -> None:
        if self._assign is None or attach.epoch != self._assign.epoch:
            return
        if attach.outgoing:
            self._sender = None
        elif attach.channel == "tokens":
            self._returning = False
        self._lost(attach.channel, outgoing=attach.outgoing, reason=reason)

    def _on_start(self, start: Start) -> None:
        now = time.monotonic()
        stops = self._stage.shape.stop_tokens if self._stage else ()
        sampling = start.sampling
        merged = (*sampling.stop_tokens, *stops)[:MAX_STOP_TOKENS]
        opening = Opening(
            start.session,
            start.reply_to,
            len(start.prompt),
            msgspec.structs.replace(sampling, stop_tokens=merged),
        )
        try:
            if self._schedule is None or self._stage is None:
                raise ResourceExhausted("this is not the first stage")
            shape = self._stage.shape
            if (
                not start.prompt
                or max(start.prompt) >= shape.vocab_size
                or len(start.prompt) + sampling.max_tokens > shape.context
            ):
                raise ResourceExhausted("prompt outside vocabulary or context")
            self._schedule.submit(opening, start.prompt, now)
        except ResourceExhausted:
            self._fail(start.session, start.reply_to)

    def _on_frame(self, frame: Frame) -> None:
        try:
            if frame.kind == KIND_FEEDBACK and self._schedule is not None:
                for pick in FEEDBACK.decode_untrusted(frame.meta).picks:
                    self._on_pick(pick)
            elif frame.kind == KIND_ACTIVATIONS and self._stage is not None:
                self._on_activations(frame)
            else:
                raise RemoteProtocolError(f"frame of kind {frame.kind}")
        except RemoteProtocolError as exc:
            for channel in self._channels:
                channel.shut()
            self._channels.clear()
            self._sender, self._returning = None, False
            name = KIND_CHANNELS.get(frame.kind, "activations")
            self._lost(name, outgoing=False, reason=exc.reason)

    def _on_pick(self, pick: Pick) -> None:
        assert self._schedule is not None
        ended = self._schedule.pick(
            pick.sequence, pick.token, pick.finish, time.monotonic()
        )
        if ended is not None:
            self._tell(Ended(ended.session, ended.reply_to))

    def _on_activations(self, frame: Frame) -> None:
        assert self._stage is not None
        assert self._assign is not None
        if self._sender is None:
            if len(self._held) >= _MAX_HELD_FRAMES:
                raise RemoteProtocolError(f"{_MAX_HELD_FRAMES} frames too early")
            self._held.append(frame)
            return
        message = ACTIVATIONS.decode_untrusted(frame.meta)
        tokens = check_rows_untrusted(
            message.rows, self._assign.max_sequences, self._stage.shape.context
        )
        size = self._stage.shape.hidden_size
        if len(frame.payload) != tokens * size * _ELEMENT_BYTES:
            raise RemoteProtocolError(f"{len(frame.payload)} B for {tokens} tokens")
        x_TD = torch.frombuffer(frame.payload, dtype=torch.float32).view(-1, size)
        self._compute(x_TD, message.rows)

    def _next_step(self) -> float | None:
        if self._schedule is None or not self._wired():
            return None
        return self._schedule.next_timeout()

    def _wired(self) -> bool:
        if self._assign is None or self._stage is None:
            return False
        return self._assign.stages == 1 or (
            self._sender is not None and self._returning
        )

    def _step_if_due(self) -> None:
        if self._schedule is None or self._stage is None or not self._wired():
            return
        began = time.monotonic()
        slices = self._schedule.take(began)
        if not slices:
            return
        tokens = [token for piece in slices for token in piece.tokens]
        self._compute(self._stage.embed(tokens), tuple(p.row for p in slices))
        if self._schedule is not None:
            self._schedule.stepped(time.monotonic() - began)

    def _compute(self, x_TD: torch.Tensor, rows: tuple[Row, ...]) -> None:
        assert self._stage is not None
        y_TD = self._stage.forward(x_TD, rows)
        if self._stage.last:
            self._pick(y_TD, rows)
            return
        assert self._assign is not None
        meta = ACTIVATIONS.encode(Activations(self._assign.epoch, rows))
        self._send(KIND_ACTIVATIONS, meta, byte_view(y_TD.contiguous()))

    def _pick(self, y_TD: torch.Tensor, rows: tuple[Row, ...]) -> None:
        assert self._stage is not None
        assert self._assign is not None
        for row in rows:
            if row.opening is not None:
                self._openings[row.slot] = (row.sequence, row.opening)
        picked = pick_tokens(self._stage, y_TD, rows, self._openings)
        if not picked:
            return
        self._tell(Sampled(tuple((to, token) for to, token, _ in picked)))
        picks = tuple(pick for _, _, pick in picked)
        if self._assign.stages == 1:
            for pick in picks:
                self._on_pick(pick)
        else:
            meta = FEEDBACK.encode(Feedback(self._assign.epoch, picks))
            self._send(KIND_FEEDBACK, meta)

    def _send(self, kind: int, meta: bytes, payload: memoryview | bytes = b"") -> None:
        if self._sender is None:
            return  # lost a moment ago; the next generation feeds it all again
        try:
            self._sender.send(kind, meta, payload)
        except Unavailable as exc:
            self._sender = None
            self._lost(KIND_CHANNELS[kind], outgoing=True, reason=exc.reason)

    def _lost(self, channel: ChannelName, *, outgoing: bool, reason: str) -> None:
        assert self._assign is not None
        self._tell(ChannelLost(self._assign.epoch, channel, outgoing, reason[:2000]))

    def _repeat(self, schedule: Schedule) -> None:
        """Send what was picked once more: a lost last stage may have kept it."""
        tokens = [
            (opening.reply_to, SessionToken(opening.session, index, token))
            for opening, index, token in schedule.picked()
        ]
        for at in range(0, len(tokens), MAX_ROWS):
            self._tell(Sampled(tuple(tokens[at : at + MAX_ROWS])))

    def _fail(self, session: str, reply_to: Peer) -> None:
        token = SessionToken(session, 0, -1, "error")
        self._tell(Sampled(((reply_to, token),)))
        self._tell(Ended(session, reply_to))

    def _tell(self, event: Event) -> None:
        self._port.send(EVENTS.encode(event))


def check_rows_untrusted(rows: Sequence[Row], slots: int, context: int) -> int:
    """Return the number of tokens in ``rows`` of a neighbour.

    Raises:
        RemoteProtocolError: a slot twice or out of range, or beyond the context.
    """
    if len({row.slot for row in rows}) < len(rows):
        raise RemoteProtocolError("two rows of one slot in a step")
    for row in rows:
        if row.slot >= slots or row.position + row.length > context:
            raise RemoteProtocolError(
                f"row of slot {row.slot}, tokens {row.position}+{row.length}"
            )
    return sum(row.length for row in rows)
