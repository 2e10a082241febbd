"""One reconciliation between two simulated peers: the shell of ``reconcile.py``."""

from __future__ import annotations

from collections.abc import Callable

from crdt_store.messages import SALT_BYTES, SYNC_METHOD, Ask
from crdt_store.outcome import Outcome
from crdt_store.reconcile import Session, answer, parse_request_untrusted
from fabric.core.errors import RemoteProtocolError
from fabric.net.data_config import RpcConfig
from sims.engine.queue import Engine
from sims.model.frames import call_bytes, response_bytes
from sims.model.network import Network
from sims.peers.node import Node

_RPC = RpcConfig()
Ended = Callable[["Exchange", str], None]
"""Called with the reason, empty when all went well."""


class Exchange:
    """A session under way.

    Args:
        engine: Virtual time.
        network: Carries requests and responses.
        node: Who started it.
        partner: Who answers.
        ended: Called once.
        breaks_at: Request after which the connection breaks; 0: never.

    Attributes:
        num_bytes: Sent both ways so far.
        num_new: Entries that ``node`` did not hold before.
    """

    __slots__ = (
        "_breaks_at",
        "_ended",
        "_engine",
        "_generations",
        "_network",
        "_session",
        "node",
        "num_bytes",
        "num_new",
        "partner",
    )

    def __init__(
        self,
        engine: Engine,
        network: Network,
        node: Node,
        partner: Node,
        ended: Ended,
        breaks_at: int = 0,
    ) -> None:
        self._engine = engine
        self._network = network
        self._ended = ended
        self._breaks_at = breaks_at
        self._session = Session(node.replica, node.rng.randbytes(SALT_BYTES))
        self._generations = node.generation, partner.generation
        self.node = node
        self.partner = partner
        self.num_bytes = 0
        self.num_new = 0

    @property
    def num_requests(self) -> int:
        """Requests sent so far."""
        return self._session.num_requests

    def step(self) -> None:
        """Send the next request, or end."""
        request = self._session.next_request()
        if request is None:
            self.node.last_sync = self.node.wall(self._engine.now)
            self._ended(self, "")
            return
        if self._session.num_requests == self._breaks_at:
            self._ended(self, "E_BROKEN")
            return
        size = call_bytes(len(request), SYNC_METHOD)
        self.num_bytes += size
        self._network.send(
            self.node.number,
            self.partner.number,
            "sync",
            size,
            self._serve_untrusted,
            self._lost,
            request,
        )

    def _serve_untrusted(self, data: bytes) -> None:
        if self._restarted():
            self._lost(data)
            return
        now = self._engine.now
        request = parse_request_untrusted(data)
        if isinstance(request, Ask) and request.entries:
            authority, wall = self.partner.replica.authority, self.partner.wall(now)
            stranger = not authority.membership(self.node.peer, wall).allowed
            self.partner.take_in_untrusted(request.entries, now, live=stranger)
        response = answer(self.partner.replica, request)
        size = response_bytes(len(response))
        self.num_bytes += size
        self._network.send(
            self.partner.number,
            self.node.number,
            "sync",
            size,
            self._receive_untrusted,
            self._lost,
            response,
        )

    def _receive_untrusted(self, data: bytes) -> None:
        if self._restarted():
            self._lost(data)
            return
        try:
            raws = self._session.receive_untrusted(data)
        except RemoteProtocolError as exc:
            self._ended(self, exc.code)
            return
        if raws:
            now = self._engine.now
            outcomes = self.node.take_in_untrusted(raws, now, live=False)
            self.num_new += outcomes[Outcome.ACCEPTED]
        self.step()

    def _restarted(self) -> bool:
        return self._generations != (self.node.generation, self.partner.generation)

    def _lost(self, data: bytes = b"") -> None:
        """Have the caller notice: at once from a reset, else when pings stay away."""
        numbers = self.node.number, self.partner.number
        silent = all(self._network.online[n] for n in numbers) and not self._restarted()
        late = _RPC.dead_after_seconds if silent else 0.0
        self._engine.after(late, self._ended, self, "E_UNAVAILABLE")
