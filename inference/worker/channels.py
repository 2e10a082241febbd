"""Bulk channels of a stage: threads shake hands and receive, the engine sends."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from fabric.bulk.certificates import Credentials
from fabric.bulk.channel import BulkReceiver, BulkSender, ByteSocket, Frame
from fabric.bulk.tls import handshake
from fabric.core.errors import FabricError
from inference.worker_messages import Attach

HANDSHAKE_SECONDS = 10.0
"""A neighbour that was just handed its socket answers at once, or never."""


@dataclass(frozen=True)
class Opened:
    """A channel passed its handshake; ``sender`` is None for an incoming one."""

    attach: Attach
    sender: BulkSender | None


@dataclass(frozen=True)
class Received:
    """A frame of an incoming channel."""

    epoch: int
    frame: Frame


@dataclass(frozen=True)
class Lost:
    """A channel failed its handshake or broke."""

    attach: Attach
    reason: str


Report = Opened | Received | Lost


class Channel:
    """One attached socket, in the care of a thread until it is shut.

    Args:
        attach: What it is for.
        fd: The connected socket; owned.
        credentials: Ours, or None where the neighbour is on the same daemon.
        max_payload: Largest frame accepted, in bytes.
        report: Called from the thread.
    """

    def __init__(
        self,
        attach: Attach,
        fd: int,
        credentials: Credentials | None,
        *,
        max_payload: int,
        report: Callable[[Report], None],
    ) -> None:
        self._attach = attach
        self._socket = socket.socket(fileno=fd)
        # A second descriptor of the same connection: shutting it down wakes a thread
        # that reads through TLS, which must not be touched from outside.
        self._alarm = self._socket.dup()
        self._credentials = credentials
        self._max_payload = max_payload
        self._report = report
        name = f"{attach.channel}-{attach.epoch}"
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def shut(self) -> None:
        """End the connection; its thread ends soon after."""
        with suppress(OSError):  # the neighbour was faster
            self._alarm.shutdown(socket.SHUT_RDWR)
        self._alarm.close()

    def _run(self) -> None:
        try:
            self._serve(self._secure())
        except FabricError as exc:
            self._report(Lost(self._attach, exc.reason))

    def _secure(self) -> ByteSocket:
        attach = self._attach
        if not attach.peer_certificate or self._credentials is None:
            self._socket.settimeout(None)
            return self._socket
        return handshake(
            self._socket,
            self._credentials,
            attach.peer_certificate,
            server=attach.server,
            timeout_seconds=HANDSHAKE_SECONDS,
        )

    def _serve(self, sock: ByteSocket) -> None:
        if self._attach.outgoing:
            self._report(Opened(self._attach, BulkSender(sock)))
            return
        self._report(Opened(self._attach, None))
        receiver = BulkReceiver(sock, self._max_payload, stall_seconds=None)
        try:
            while True:
                self._report(Received(self._attach.epoch, receiver.receive()))
        finally:
            receiver.close()
