"""``fabric sim``: simulated meshes, and real daemons on this machine to hurt."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import cyclopts

from fabric.app.cli_output import show_json, show_table, show_text, talk
from fabric.core.errors import ConfigError, Unavailable
from sims.command import run
from sims.lab.command import lab
from sims.local import LocalMesh

app = cyclopts.App(name="sim", help="Run many peers on this machine, and hurt them.")
app.command(lab)
app.command(run)

Directory = Annotated[Path, cyclopts.Parameter(name="--dir")]
DEFAULT_DIRECTORY = Path("fabric-sim")


@app.command
def up(
    *,
    n: Annotated[int, cyclopts.Parameter(name=("-n", "--peers"))] = 4,
    directory: Directory = DEFAULT_DIRECTORY,
    json: bool = False,
) -> None:
    """Start N daemons on loopback, in one mesh; they stay when this command ends.

    Args:
        n: Number of peers.
        directory: Where their homes are.
        json: Print JSON.
    """
    if n < 1:
        raise ConfigError(f"-n {n}: a mesh has at least one peer")
    names = [f"peer-{i}" for i in range(n)]
    mesh = LocalMesh(directory)
    mesh.start_all(names)
    mesh.create_mesh(names[0], "sim")
    token = mesh.client(names[0]).invite(uses=max(1, n - 1))
    for name in names[1:]:
        mesh.client(name).join(token)
        talk(f"{name} joined")
    if json:
        show_json({"mesh": mesh.mesh, "peers": [mesh.peer(x) for x in names]})
    else:
        _table(mesh)
        home = mesh.peer(names[0]).home
        talk(f"next: fabric status --home {home}; fabric sim down --dir {directory}")


@app.command
def status(*, directory: Directory = DEFAULT_DIRECTORY, json: bool = False) -> None:
    """Show the daemons of the simulation.

    Args:
        directory: Where their homes are.
        json: Print JSON.
    """
    mesh = LocalMesh.open(directory)
    if json:
        show_json({"mesh": mesh.mesh, "alive": mesh.names})
    else:
        _table(mesh)


@app.command
def kill(name: str, *, directory: Directory = DEFAULT_DIRECTORY) -> None:
    """End a daemon with SIGKILL.

    Args:
        name: Name of the peer.
        directory: Where their homes are.
    """
    LocalMesh.open(directory).kill(name)


@app.command
def pause(name: str, *, directory: Directory = DEFAULT_DIRECTORY) -> None:
    """Freeze a daemon (SIGSTOP).

    Args:
        name: Name of the peer.
        directory: Where their homes are.
    """
    LocalMesh.open(directory).pause(name)


@app.command
def resume(name: str, *, directory: Directory = DEFAULT_DIRECTORY) -> None:
    """Let a frozen daemon go on.

    Args:
        name: Name of the peer.
        directory: Where their homes are.
    """
    LocalMesh.open(directory).resume(name)


@app.command
def partition(*groups: str, directory: Directory = DEFAULT_DIRECTORY) -> None:
    """Cut contact between groups: `fabric sim partition peer-0,peer-1 peer-2,peer-3`.

    Args:
        groups: Names joined by commas, one group each.
        directory: Where their homes are.
    """
    if len(groups) < 2:
        raise ConfigError("a partition needs at least two groups")
    LocalMesh.open(directory).partition([g.split(",") for g in groups])


@app.command
def heal(*, directory: Directory = DEFAULT_DIRECTORY) -> None:
    """End every partition.

    Args:
        directory: Where their homes are.
    """
    LocalMesh.open(directory).heal()


@app.command
def down(*, directory: Directory = DEFAULT_DIRECTORY) -> None:
    """End all daemons of the simulation; their homes stay.

    Args:
        directory: Where their homes are.
    """
    LocalMesh.open(directory).down()


def _table(mesh: LocalMesh) -> None:
    rows: list[tuple[object, ...]] = []
    for name in mesh.names:
        try:
            view = mesh.client(name).status()
        except Unavailable as exc:
            rows.append((name, mesh.peer(name).pid, "-", exc.reason, None))
        else:
            connected = sum(p.connected for p in view.peers)
            rows.append((name, mesh.peer(name).pid, view.peer, view.state, connected))
    show_text(f"mesh {mesh.mesh[:16]}")
    show_table(("NAME", "PID", "PEER", "STATE", "CONNECTED"), rows)
