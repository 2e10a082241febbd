"""What the daemon and its clients say to each other on the control socket.

One request at a time per connection. A frame is a 4-byte length and a msgpack message.
The answer to a request is any number of :class:`Item`, then one :class:`Done` or
:class:`Failed`. No tensor byte passes here.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from fabric.app.plan_messages import PlanLinks
from fabric.core.codec import Codec

MAX_CONTROL_BYTES = 8 << 20
"""Largest frame; lists are paged by their verbs long before."""

COPIES_FACT = "checkpoint_copies"
"""Of a job's newest checkpoint: copies known here, of those that should be ("2/2")."""

Text = Annotated[str, msgspec.Meta(max_length=10_000)]


class Status(msgspec.Struct, frozen=True, tag="status"):
    """Who am I, in which mesh, and who is connected?"""


class MeshInit(msgspec.Struct, frozen=True, tag="mesh_init"):
    """Create a mesh with this peer as its owner.

    The root key stays with whoever asks: the daemon gets its public half and the entry
    that it signed.
    """

    name: Text
    root: bytes
    grant: bytes


class Invite(msgspec.Struct, frozen=True, tag="invite"):
    """Make a token with which others can join."""

    role: Text = "worker"
    ttl_seconds: float = 3600.0
    uses: int = 1


class Join(msgspec.Struct, frozen=True, tag="join"):
    """Join the mesh of an invite token."""

    token: Text


class Trust(msgspec.Struct, frozen=True, tag="trust"):
    """List members and invites; each item is a ``crdt_store.trust.TrustRow``."""


class Grant(msgspec.Struct, frozen=True, tag="grant"):
    """Give a peer a role below this peer's own."""

    peer: Text
    role: Text


class Revoke(msgspec.Struct, frozen=True, tag="revoke"):
    """Void a membership or an invite; ``lift`` takes that back."""

    peer: Text
    reason: Text = ""
    lift: bool = False


class RootSigned(msgspec.Struct, frozen=True, tag="root_signed"):
    """Return the present root's PeerId, then hex ids of what it signed."""


class AddAuthority(msgspec.Struct, frozen=True, tag="add_authority"):
    """Take in an authority entry that was signed elsewhere, by the root."""

    entry: bytes


class Leave(msgspec.Struct, frozen=True, tag="leave"):
    """Leave the mesh and forget it."""


class Submit(msgspec.Struct, frozen=True, tag="submit"):
    """Submit a job; ``spec`` is an encoded JobSpec."""

    spec: bytes


class Jobs(msgspec.Struct, frozen=True, tag="jobs"):
    """List the jobs of the mesh."""


class JobEvents(msgspec.Struct, frozen=True, tag="job_events"):
    """Stream a job's events from ``since`` on; with ``follow`` until it ends."""

    job: Text
    since: int = 0
    follow: bool = False


class StopJob(msgspec.Struct, frozen=True, tag="stop_job"):
    """Cancel a job."""

    job: Text


class Board(msgspec.Struct, frozen=True, tag="board"):
    """Show a job's notes, tags and settings."""

    job: Text


class BoardEdit(msgspec.Struct, frozen=True, tag="board_edit"):
    """Write on a job's board, then show it; ``sets`` maps path to number or "null"."""

    job: Text
    notes: tuple[Text, ...] = ()
    tags: tuple[Text, ...] = ()
    untags: tuple[Text, ...] = ()
    sets: dict[Text, Text] = {}


class Why(msgspec.Struct, frozen=True, tag="why"):
    """Explain a peer's or a job's state."""

    subject: Text


class Serve(msgspec.Struct, frozen=True, tag="serve"):
    """Serve a checkpoint of the content store behind an OpenAI-compatible endpoint."""

    checkpoint: Text
    stages: int = 2
    port: int = 0
    model_name: Text = "fabric"


class ContentAdd(msgspec.Struct, frozen=True, tag="content_add"):
    """Add a file or directory of this machine to the content store and provide it."""

    path: Text


class ContentGet(msgspec.Struct, frozen=True, tag="content_get"):
    """Fetch content by root from any peers that hold it; write it to ``path``."""

    root: Text
    path: Text


class ContentPin(msgspec.Struct, frozen=True, tag="content_pin"):
    """Keep content that is here, whatever else is removed; or no longer."""

    root: Text
    pinned: bool = True


class CheckpointFetch(msgspec.Struct, frozen=True, tag="checkpoint_fetch"):
    """Write a checkpoint, or its tensors that ``only`` names, to ``path``."""

    root: Text
    path: Text
    only: tuple[Text, ...] = ()


class ContentProgress(msgspec.Struct, frozen=True, tag="content_progress"):
    """Say how far the fetch of ``root`` is, as a ``dht.progress.Progress``."""

    root: Text


class ContentList(msgspec.Struct, frozen=True, tag="content_list"):
    """List the content held here."""


class Ping(msgspec.Struct, frozen=True, tag="ping"):
    """Measure the round trip to a peer, once per item."""

    peer: Text
    count: int = 3
    interval_seconds: float = 0.0


class Doctor(msgspec.Struct, frozen=True, tag="doctor"):
    """Say what keeps peers from connecting; with ``peer``, the whole chain to it.

    Each item is a ``nat.doctor.findings.Finding``.
    """

    peer: Text = ""


class Partition(msgspec.Struct, frozen=True, tag="partition"):
    """Refuse all contact with these peers (tests and simulation); empty heals."""

    peers: tuple[Text, ...] = ()


class Down(msgspec.Struct, frozen=True, tag="down"):
    """End the daemon; ``drain`` leaves running jobs first."""

    drain: bool = False


Request = (
    Status
    | MeshInit
    | Invite
    | Join
    | Leave
    | Trust
    | Grant
    | Revoke
    | RootSigned
    | AddAuthority
    | Submit
    | Jobs
    | JobEvents
    | StopJob
    | Board
    | BoardEdit
    | Why
    | Serve
    | ContentAdd
    | ContentGet
    | ContentPin
    | CheckpointFetch
    | ContentProgress
    | ContentList
    | Ping
    | Doctor
    | PlanLinks
    | Partition
    | Down
)


class Item(msgspec.Struct, frozen=True, tag="item"):
    """One result, encoded; its type belongs to the verb."""

    value: bytes


class Done(msgspec.Struct, frozen=True, tag="done"):
    """The request is complete."""


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The request failed; the fields of a FabricError."""

    code: str
    reason: str
    next_step: str = ""
    kind: str = "FabricError"
    exit_code: int = 1


class PeerView(msgspec.Struct, frozen=True):
    """One row of ``fabric status`` and ``fabric peers``.

    Attributes:
        path: Of the RPC connection: "direct", "punched" or "relay"; "-" without.
        note: Code of the last error while not connected.
        up_mbit: Measured towards the peer, or None.
        down_mbit: Measured from the peer, or None.
        version: What it runs, as it says.
        addrs: Where it was last known to be, best first.
        control: The kinds of its control connections, best first.
        liveness: "alive", "suspect", "dead" (unreachable from here) or "unknown".
        running: Jobs it takes part in, as it said lately, or None.
        reach: "connected", "connecting", "on demand" (there, but no neighbour) or
            "unreachable".
    """

    peer: str
    name: str
    role: str
    connected: bool
    path: str
    rtt_ms: float | None
    trust: str
    note: str = ""
    up_mbit: float | None = None
    down_mbit: float | None = None
    version: str = ""
    addrs: tuple[str, ...] = ()
    control: tuple[str, ...] = ()
    liveness: str = "unknown"
    running: int | None = None
    reach: str = ""


class StatusView(msgspec.Struct, frozen=True):
    """What ``fabric status`` shows.

    Attributes:
        state_hash: Equal on peers that hold the same replicated state.
        entries: How many entries that state has.
    """

    peer: str
    name: str
    version: str
    state: Literal["no mesh", "joining", "member"]
    mesh: str
    mesh_name: str
    role: str
    addrs: tuple[str, ...]
    peers: tuple[PeerView, ...]
    counters: dict[str, int]
    state_hash: str = ""
    entries: int = 0


class JobRow(msgspec.Struct, frozen=True):
    """One row of ``fabric jobs``.

    Attributes:
        absent: Coordinator and participants of a job that is not over who are not
            there: "dead" (unreachable from here), "left" or "no member", by peer.
    """

    job: str
    name: str
    kind: str
    state: str
    reason: str
    coordinator: str
    generation: int
    participants: tuple[str, ...]
    round: int
    rounds: int
    facts: dict[str, str | int | float | bool]
    absent: dict[str, str] = {}


class EventView(msgspec.Struct, frozen=True):
    """One event of a job, numbered from 1 in the order its coordinator saw them."""

    seq: int
    time: float
    kind: str
    peer: str
    facts: dict[str, str | int | float | bool]


class Line(msgspec.Struct, frozen=True):
    """A single string: a token, an id, a root, an address."""

    text: str


class Lines(msgspec.Struct, frozen=True):
    """Sentences for people."""

    lines: tuple[str, ...]


class PingView(msgspec.Struct, frozen=True):
    """One round trip.

    Attributes:
        path: What carried it.
        paths: The kinds of all live connections with the peer, best first.
        before: The path before, when it changed since the last round trip.
        before_ms: The round trip on that path.
    """

    peer: str
    path: str
    rtt_ms: float
    paths: tuple[str, ...] = ()
    before: str = ""
    before_ms: float | None = None


Reply = Item | Done | Failed

REQUESTS: Codec[Request] = Codec(Request, max_bytes=MAX_CONTROL_BYTES)
REPLIES: Codec[Reply] = Codec(Reply, max_bytes=MAX_CONTROL_BYTES)
