"""One peer: its identity, its data folder, and at most one mesh at a time."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import trio

from crdt_store.grants import founded_untrusted
from crdt_store.invites import parse_token_untrusted, redeem
from crdt_store.roles import Role
from fabric.app.config import NodeConfig
from fabric.app.control_server import serve_control
from fabric.app.control_verbs import ControlVerbs
from fabric.app.home import Home
from fabric.app.membership_file import (
    MeshMembership,
    forget_membership,
    load_membership,
    save_membership,
)
from fabric.app.session import Session
from fabric.app.session_open import open_session
from fabric.core.errors import ConfigError, PeerTimeout
from fabric.core.signing import Ed25519Signer
from fabric.core.telemetry import Counters

log = logging.getLogger(__name__)

DRAIN_SECONDS = 5.0
"""Longest time to leave running jobs before the daemon ends."""


class Node:
    """What the control API acts on.

    Args:
        home: Files of this peer; its data folder is locked by the caller.
        config: Settings.
        signer: Identity.

    Attributes:
        ended: Set by ``fabric down``.
    """

    def __init__(self, home: Home, config: NodeConfig, signer: Ed25519Signer) -> None:
        self.home = home
        self.config = config
        self.signer = signer
        self.counters = Counters()
        self.ended = trio.Event()
        self.joining = False
        self._session: Session | None = None
        self._scope: trio.CancelScope | None = None
        self._nursery: trio.Nursery | None = None
        self._closed = trio.Event()

    @property
    def session(self) -> Session | None:
        """The services of the mesh we belong to, or None."""
        return self._session

    def require_session(self) -> Session:
        """Return the session.

        Raises:
            ConfigError: this peer belongs to no mesh.
        """
        if self._session is None or self.joining:
            raise ConfigError(
                "this peer belongs to no mesh",
                code="E_NO_MESH",
                next_step="`fabric mesh init NAME`, or `fabric join TOKEN`",
            )
        return self._session

    async def run(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Serve until cancelled; ready when the control API answers."""
        membership = load_membership(self.home.mesh_file)
        async with trio.open_nursery() as self._nursery:
            if membership is not None:
                await self._start_session(membership)
            verbs = ControlVerbs(self)
            await self._nursery.start(
                serve_control, self.home.control_socket, verbs.answer, self.counters
            )
            task_status.started()

    async def mesh_init(self, name: str, root: bytes, grant: bytes) -> str:
        """Create a mesh owned by this peer; return its id.

        Args:
            name: Of the mesh.
            root: Public half of its root key; the other half never comes here.
            grant: The entry in which the root makes this peer an owner.

        Raises:
            ConfigError: this peer has a mesh, or the grant says something else.
        """
        self._refuse_second_mesh()
        mesh = founded_untrusted(name, root, grant, self.signer.peer_id)
        membership = MeshMembership(mesh, (), (grant,))
        session = await self._start_session(membership)
        save_membership(self.home.mesh_file, membership)
        await session.publish_record()  # until then the mesh has nobody to work
        return mesh.id

    async def invite(self, role: str, ttl_seconds: float, uses: int) -> str:
        """Return a token for ``uses`` peers."""
        session = self.require_session()
        try:
            wanted = Role(role)
        except ValueError:
            raise ConfigError(
                f"no role {role!r}", next_step="worker, client, relay or verifier"
            ) from None
        return await session.store.admin.invite(
            session.bootstrap(),
            role=wanted,
            uses=uses,
            ttl_seconds=int(ttl_seconds),
        )

    async def join(self, token: str) -> str:
        """Join the mesh of ``token``; return its id once a member admitted us.

        Raises:
            ConfigError: a bad token, or this peer has a mesh already.
            FabricError: why no member admitted us; nothing is kept.
        """
        self._refuse_second_mesh()
        invite = parse_token_untrusted(token)
        redemption = redeem(invite, self.signer.peer_id, time.time())
        membership = MeshMembership(invite.mesh, invite.bootstrap, (redemption.raw,))
        self.joining = True
        try:
            session = await self._start_session(membership)
            await self._be_admitted(session, invite.bootstrap)
        finally:
            self.joining = False
        save_membership(self.home.mesh_file, membership)
        return invite.mesh_id

    async def _be_admitted(self, session: Session, bootstrap: Sequence[str]) -> None:
        """Join, or leave nothing: also when the client that asked has hung up."""
        seconds = self.config.mesh.join_seconds
        try:
            with trio.fail_after(seconds):
                await session.join_through(bootstrap)
        except BaseException as exc:
            with trio.CancelScope(shield=True):
                await self._stop_session()
            if isinstance(exc, trio.TooSlowError):
                raise PeerTimeout(
                    f"no member answered within {seconds:g} s",
                    next_step="check that a member is up, or ask for a new token",
                ) from None
            raise

    async def leave(self) -> None:
        """Leave the mesh, say so, and forget it."""
        session = self.require_session()
        await self.leave_jobs()
        await session.say_goodbye()
        forget_membership(self.home.mesh_file)
        await self._stop_session()

    async def leave_jobs(self) -> None:
        """Leave running jobs cleanly, as far as DRAIN_SECONDS allow."""
        if self._session is not None:
            with trio.move_on_after(DRAIN_SECONDS):
                await self._session.leave_jobs()

    def _refuse_second_mesh(self) -> None:
        if self._session is not None or self.joining:
            raise ConfigError(
                "this peer belongs to a mesh already",
                code="E_HAS_MESH",
                next_step="`fabric leave` first, or use another --home",
            )

    async def _start_session(self, membership: MeshMembership) -> Session:
        if self._nursery is None:
            raise ConfigError("the daemon is not running yet")
        self._closed = trio.Event()
        session: Session = await self._nursery.start(self._run_session, membership)
        return session

    async def _run_session(
        self, membership: MeshMembership, *, task_status: trio.TaskStatus[Session]
    ) -> None:
        """Run the services of one mesh until :meth:`_stop_session`."""
        closed = self._closed
        try:
            with trio.CancelScope() as self._scope:
                async with open_session(self, membership) as session:
                    self._session = session
                    task_status.started(session)
                    await trio.sleep_forever()
        finally:
            self._session = None
            closed.set()

    async def _stop_session(self) -> None:
        if self._scope is not None:
            self._scope.cancel()
        await self._closed.wait()
