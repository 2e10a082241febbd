"""The Python client for trio programs: the names of ``client``, awaitable."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import trio

from fabric.app import control_messages as m
from fabric.app.board_messages import BoardView
from fabric.app.client import RECEIVE_BYTES, board_edit, not_running, spec_of
from fabric.app.control_client import Exchange, decode
from fabric.app.home import Home
from fabric.app.root_key import found_mesh
from fabric.core.errors import FabricError, Unavailable
from fabric.jobs.spec import CODEC, JobSpec

T = TypeVar("T")


class AsyncClient:
    """A connection to one daemon; bound every call with ``trio.fail_after``."""

    def __init__(self, path: Path) -> None:
        self._path = path

    async def items(self, request: m.Request, kind: type[T]) -> AsyncIterator[T]:
        """Yield the answers to ``request``."""
        exchange = Exchange(request)
        try:
            stream = await trio.open_unix_socket(str(self._path))
        except OSError as exc:
            raise not_running(self._path) from exc
        async with stream:
            try:
                await stream.send_all(exchange.request)
                while not exchange.done:
                    data = await stream.receive_some(RECEIVE_BYTES)
                    for value in exchange.receive(bytes(data)):
                        yield decode(value, kind)
            except trio.BrokenResourceError as exc:
                raise Unavailable(f"the daemon went away: {exc}") from exc

    async def one(self, request: m.Request, kind: type[T]) -> T:
        """Return the single answer to ``request``."""
        result: list[T] = [item async for item in self.items(request, kind)]
        if not result:
            raise Unavailable("the daemon gave no answer")
        return result[0]

    async def status(self) -> m.StatusView:
        """Return this peer, its mesh and its peers."""
        return await self.one(m.Status(), m.StatusView)

    async def mesh_init(self, name: str) -> str:
        """Create a mesh owned by this peer; return its id.

        See :meth:`fabric.app.client.Client.mesh_init`.
        """
        request, _ = found_mesh(name, (await self.status()).peer)
        return (await self.one(request, m.Line)).text

    async def invite(
        self, *, role: str = "worker", ttl_seconds: float = 3600, uses: int = 1
    ) -> str:
        """Return a token with which ``uses`` peers can join."""
        return (await self.one(m.Invite(role, ttl_seconds, uses), m.Line)).text

    async def join(self, token: str) -> str:
        """Join the mesh of ``token``; return the mesh's id."""
        return (await self.one(m.Join(token), m.Line)).text

    async def submit(
        self, spec: JobSpec | str | Path, set: Mapping[str, object] | None = None
    ) -> AsyncJob:
        """Submit a job; ``spec`` may be the path of a TOML file."""
        encoded = CODEC.encode(spec_of(spec, set))
        return AsyncJob(self, (await self.one(m.Submit(encoded), m.Line)).text)

    async def jobs(self) -> list[m.JobRow]:
        """Return the jobs of the mesh."""
        return [row async for row in self.items(m.Jobs(), m.JobRow)]

    async def why(self, subject: str) -> tuple[str, ...]:
        """Return sentences that explain the state of a peer or job."""
        return (await self.one(m.Why(subject), m.Lines)).lines


class AsyncJob:
    """A submitted job."""

    def __init__(self, client: AsyncClient, job: str) -> None:
        self._client = client
        self.id = job

    def events(
        self, *, since: int = 0, follow: bool = True
    ) -> AsyncIterator[m.EventView]:
        """Yield the job's events; with ``follow`` until the job ends."""
        return self._client.items(m.JobEvents(self.id, since, follow), m.EventView)

    async def result(self) -> m.JobRow:
        """Wait for the end; return the row with its facts.

        Raises:
            FabricError: the job failed or was cancelled; the reason says why.
        """
        async for _ in self.events():
            pass
        for row in await self._client.jobs():
            if row.job.startswith(self.id) and row.state == "done":
                return row
        raise FabricError(f"job {self.id[:8]} did not succeed", code="E_JOB_FAILED")

    async def board(self) -> BoardView:
        """Return the job's notes, tags and settings, and who wrote them."""
        return await self._client.one(m.Board(self.id), BoardView)

    async def write_board(
        self,
        *,
        notes: Sequence[str] = (),
        tags: Sequence[str] = (),
        untags: Sequence[str] = (),
        set: Mapping[str, float | str | None] | None = None,
    ) -> BoardView:
        """Write on the job's board and return it; None sets back to the spec."""
        edit = board_edit(self.id, notes, tags, untags, set)
        return await self._client.one(edit, BoardView)

    async def stop(self) -> None:
        """Cancel the job."""
        await self._client.one(m.StopJob(self.id), m.Line)


@asynccontextmanager
async def aconnect(home: str | Path | None = None) -> AsyncIterator[AsyncClient]:
    """Yield a client of the daemon in ``home`` (default: this user's daemon)."""
    yield AsyncClient(Home.find(Path(home) if home else None).control_socket)
