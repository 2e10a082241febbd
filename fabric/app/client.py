"""The Python client: a blocking connection to the local daemon.

    with fabric.connect() as f:
        job = f.submit("train.toml", set={"train.outer.rounds": 5})
        for event in job.events():
            print(event.kind, event.facts)
        print(job.result().facts["checkpoint"])

Every failure is a :class:`fabric.core.errors.FabricError` with a code, a reason and a
next step. ``aclient`` has the same names, awaitable.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import msgspec

from crdt_store.trust_row import TrustRow
from dht.progress import Progress
from fabric.app import control_messages as m
from fabric.app.board_messages import BoardView
from fabric.app.config_loader import set_at
from fabric.app.content_messages import ContentRow, FetchedView
from fabric.app.control_client import Exchange, decode
from fabric.app.home import Home
from fabric.app.plan_messages import PlanLinks, PlanLinksView
from fabric.app.root_key import found_mesh, write_root_key
from fabric.core.errors import FabricError, PeerTimeout, Unavailable
from fabric.core.ids import PeerId
from fabric.jobs.spec import CODEC, JobSpec, load_spec
from fabric.jobs.spec import spec_of as spec_of_tree
from nat.doctor.findings import Finding

T = TypeVar("T")
RECEIVE_BYTES = 1 << 16
CONNECT_SECONDS = 5.0
ENDED = frozenset({"done", "failed", "cancelled"})
"""Final states of a job."""


def not_running(path: Path) -> Unavailable:
    """Return the error of a client that finds no daemon behind ``path``."""
    return Unavailable(
        f"no daemon answers at {path}",
        code="E_NO_DAEMON",
        next_step="start one with `fabric up`",
    )


def spec_of(
    spec: JobSpec | str | Path, overrides: Mapping[str, object] | None
) -> JobSpec:
    """Return ``spec``, loaded when it is a path, with ``overrides`` applied."""
    if not isinstance(spec, JobSpec):
        return load_spec(Path(spec), overrides)
    tree = msgspec.to_builtins(spec)
    for key, value in (overrides or {}).items():
        set_at(tree, key.split("."), value)
    return spec_of_tree(tree, "the job spec") if overrides else spec


def board_edit(
    job: str,
    notes: Sequence[str],
    tags: Sequence[str],
    untags: Sequence[str],
    set: Mapping[str, float | str | None] | None,
) -> m.BoardEdit:
    """Return the request that writes these on a job's board."""
    sets = {k: "null" if v is None else str(v) for k, v in (set or {}).items()}
    return m.BoardEdit(job, tuple(notes), tuple(tags), tuple(untags), sets)


class Client:
    """A connection to one daemon. Not for several threads at once.

    Args:
        path: The daemon's control socket.
        timeout_seconds: Longest silence of the daemon within one request.
    """

    def __init__(self, path: Path, *, timeout_seconds: float = 60.0) -> None:
        self._path = path
        self._timeout = timeout_seconds

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return None

    def items(
        self, request: m.Request, kind: type[T], *, timeout: float | None = -1.0
    ) -> Iterator[T]:
        """Yield the answers to ``request``; closing the iterator ends the request."""
        exchange = Exchange(request)
        wait = self._timeout if timeout == -1.0 else timeout
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(CONNECT_SECONDS)
            try:
                sock.connect(str(self._path))
            except OSError as exc:
                raise not_running(self._path) from exc
            sock.settimeout(wait)
            try:
                sock.sendall(exchange.request)
                while not exchange.done:
                    for value in exchange.receive(sock.recv(RECEIVE_BYTES)):
                        yield decode(value, kind)
            except TimeoutError as exc:
                raise PeerTimeout(f"the daemon was silent for {wait:g} s") from exc
            except ConnectionError as exc:
                raise Unavailable(f"the daemon went away: {exc}") from exc

    def one(
        self, request: m.Request, kind: type[T], *, timeout: float | None = -1.0
    ) -> T:
        """Return the single answer to ``request``."""
        for item in self.items(request, kind, timeout=timeout):
            return item
        raise Unavailable("the daemon gave no answer")

    def status(self) -> m.StatusView:
        """Return this peer, its mesh and its peers."""
        return self.one(m.Status(), m.StatusView)

    def mesh_init(
        self, name: str, *, root_file: Path | None = None, passphrase: str = ""
    ) -> str:
        """Create a mesh owned by this peer; return its id.

        Args:
            name: 1-100 characters.
            root_file: Where to keep the root key, sealed with ``passphrase``. None: it
                is forgotten, and nobody can ever name another owner.
            passphrase: Must not be empty when there is a ``root_file``.
        """
        request, key = found_mesh(name, PeerId(self.status().peer))
        if root_file is not None:
            write_root_key(root_file, key, passphrase)
        return self.one(request, m.Line).text

    def invite(
        self, *, role: str = "worker", ttl_seconds: float = 3600, uses: int = 1
    ) -> str:
        """Return a token with which ``uses`` peers can join."""
        return self.one(m.Invite(role, ttl_seconds, uses), m.Line).text

    def join(self, token: str) -> str:
        """Join the mesh of ``token``; return the mesh's id."""
        return self.one(m.Join(token), m.Line).text

    def leave(self) -> None:
        """Leave the mesh and forget it."""
        self.one(m.Leave(), m.Line)

    def trust(self) -> list[TrustRow]:
        """Return who is a member by whose word, and the invites."""
        return list(self.items(m.Trust(), TrustRow))

    def grant(self, peer: str, role: str) -> None:
        """Give ``peer`` a role below our own."""
        self.one(m.Grant(peer, role), m.Line)

    def revoke(self, peer: str, reason: str = "") -> None:
        """Void the membership of ``peer``, or an invite."""
        self.one(m.Revoke(peer, reason), m.Line)

    def lift_revocation(self, peer: str) -> None:
        """Take back our revocation of ``peer``."""
        self.one(m.Revoke(peer, lift=True), m.Line)

    def root_signed(self) -> tuple[PeerId, list[bytes]]:
        """Return the present root key's id and the ids of what it signed."""
        root, *ids = self.one(m.RootSigned(), m.Lines).lines
        return PeerId(root), [bytes.fromhex(text) for text in ids]

    def add_authority(self, entry: bytes) -> None:
        """Bring an entry that the root signed into the mesh."""
        self.one(m.AddAuthority(entry), m.Line)

    def submit(
        self, spec: JobSpec | str | Path, set: Mapping[str, object] | None = None
    ) -> Job:
        """Submit a job; ``spec`` may be the path of a TOML file."""
        encoded = CODEC.encode(spec_of(spec, set))
        return Job(self, self.one(m.Submit(encoded), m.Line).text)

    def job(self, job: str) -> Job:
        """Return the job whose id starts with ``job``."""
        return Job(self, job)

    def jobs(self) -> list[m.JobRow]:
        """Return the jobs of the mesh."""
        return list(self.items(m.Jobs(), m.JobRow))

    def why(self, subject: str) -> tuple[str, ...]:
        """Return sentences that explain the state of a peer or job."""
        return self.one(m.Why(subject), m.Lines).lines

    def serve(
        self,
        checkpoint: str,
        *,
        stages: int = 2,
        port: int = 0,
        model_name: str = "fabric",
    ) -> str:
        """Serve a checkpoint; return the base URL of its OpenAI-compatible API."""
        request = m.Serve(checkpoint, stages, port, model_name)
        return self.one(request, m.Line, timeout=180).text

    def content_add(self, path: Path) -> str:
        """Add a file or directory to the content store; return its root."""
        return self.one(m.ContentAdd(str(path.absolute())), m.Line).text

    def content_get(self, root: str, path: Path) -> None:
        """Fetch ``root`` from any peers that hold it and write it to ``path``."""
        self.one(m.ContentGet(root, str(path.absolute())), m.Line, timeout=3600)

    def content_pin(self, root: str, *, pinned: bool = True) -> None:
        """Keep content that is here whatever else is removed; or no longer."""
        self.one(m.ContentPin(root, pinned), m.Line)

    def checkpoint_fetch(
        self, root: str, path: Path, only: Sequence[str] = ()
    ) -> FetchedView:
        """Write a checkpoint, or its tensors that match ``only``, to ``path``."""
        request = m.CheckpointFetch(root, str(path.absolute()), tuple(only))
        return self.one(request, FetchedView, timeout=3600)

    def content_progress(self, root: str) -> Progress:
        """Return how far a fetch of ``root`` is that another call waits for."""
        return self.one(m.ContentProgress(root), Progress)

    def content(self) -> list[ContentRow]:
        """Return the content held here."""
        return list(self.items(m.ContentList(), ContentRow))

    def ping(
        self, peer: str, count: int = 3, *, interval_seconds: float = 0.0
    ) -> Iterator[m.PingView]:
        """Yield ``count`` round trips to ``peer``, an interval apart."""
        return self.items(m.Ping(peer, count, interval_seconds), m.PingView)

    def doctor(self, peer: str = "") -> list[Finding]:
        """Return what keeps peers from connecting, and the chain to ``peer``."""
        return list(self.items(m.Doctor(peer), Finding))

    def plan_links(
        self, job: str = "", *, max_peers: int = 64, measure: bool = False
    ) -> PlanLinksView:
        """Return who takes part in ``job``, or could in one, and their links."""
        request = PlanLinks(job, max_peers, measure)
        return self.one(request, PlanLinksView, timeout=180)

    def partition(self, peers: tuple[str, ...]) -> None:
        """Refuse contact with ``peers``; an empty tuple heals."""
        self.one(m.Partition(peers), m.Line)

    def down(self, *, drain: bool = False) -> None:
        """End the daemon."""
        self.one(m.Down(drain), m.Line)


class Job:
    """A submitted job."""

    def __init__(self, client: Client, job: str) -> None:
        self._client = client
        self.id = job

    def events(self, *, since: int = 0, follow: bool = True) -> Iterator[m.EventView]:
        """Yield the job's events; with ``follow`` until the job ends."""
        request = m.JobEvents(self.id, since, follow)
        return self._client.items(request, m.EventView, timeout=None)

    def status(self) -> m.JobRow:
        """Return the job's row of :meth:`Client.jobs`."""
        rows = [r for r in self._client.jobs() if r.job.startswith(self.id)]
        if len(rows) != 1:
            raise FabricError(
                f"{len(rows)} jobs have an id that starts with {self.id}",
                code="E_NO_JOB",
                next_step="`fabric jobs` lists them",
            )
        return rows[0]

    def result(self) -> m.JobRow:
        """Wait for the end; return the row with its facts.

        Raises:
            FabricError: the job failed or was cancelled; the reason says why.
        """
        for _ in self.events():
            pass
        row = self.status()
        if row.state != "done":
            raise FabricError(
                f"job {self.id[:8]} {row.state}: {row.reason}", code="E_JOB_FAILED"
            )
        return row

    def board(self) -> BoardView:
        """Return the job's notes, tags and settings, and who wrote them."""
        return self._client.one(m.Board(self.id), BoardView)

    def write_board(
        self,
        *,
        notes: Sequence[str] = (),
        tags: Sequence[str] = (),
        untags: Sequence[str] = (),
        set: Mapping[str, float | str | None] | None = None,
    ) -> BoardView:
        """Write on the job's board and return it; None sets back to the spec."""
        edit = board_edit(self.id, notes, tags, untags, set)
        return self._client.one(edit, BoardView)

    def stop(self) -> None:
        """Cancel the job."""
        self._client.one(m.StopJob(self.id), m.Line)


def connect(home: str | Path | None = None) -> Client:
    """Return a client of the daemon in ``home`` (default: this user's daemon)."""
    return Client(Home.find(Path(home) if home else None).control_socket)
