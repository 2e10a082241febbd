"""The ``fabric`` command: one function per verb, here and in ``cli_*.py``.

Exit codes: 0 ok, 1 failed, 2 usage or config, 3 not connected, 4 not authorised, 5 not
attested, 6 not enough resources, 7 timed out, 8 integrity, 130 interrupted.
"""

from __future__ import annotations

import sys
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Annotated

import cyclopts

from fabric.app import (
    cli_board,
    cli_content,
    cli_jobs,
    cli_mesh,
    cli_net,
    cli_plan,
    cli_trust,
)
from fabric.app.cli_output import show_error
from fabric.app.up_flags import settings_of
from fabric.core.errors import FabricError

app = cyclopts.App(
    name="fabric",
    help="Train and serve models on machines you do not keep in one data centre.",
    version=lambda: version("peerfabric"),
    result_action="return_value",
)


@app.command
def up(
    *,
    home: Path | None = None,
    name: str | None = None,
    listen: str | None = None,
    relay_ok: bool | None = None,
    budget: str | None = None,
    set: Annotated[tuple[str, ...], cyclopts.Parameter(negative="")] = (),
) -> None:
    """Run this machine's peer until Ctrl+C (once: leave cleanly; twice: at once).

    Args:
        home: Directory of this peer instead of the XDG directories.
        name: Name shown to others.
        listen: Control-plane address, e.g. /ip4/0.0.0.0/tcp/4001; several with commas
            between, e.g. /ip4/0.0.0.0/tcp/4001,/ip6/::/tcp/4001.
        relay_ok: Relay for others, or never; default: while the internet reaches us.
        budget: What may be sent, e.g. 20Mbit or 20Mbit,peer=5Mbit,connections=200;
            relaying has a budget of its own, not above this one: relay=2Mbit.
        set: Settings as key=value, e.g. --set store.sync_period_seconds=2.
    """
    from fabric.app.daemon import run_daemon

    settings = settings_of(
        set, name=name, listen=listen, relay_ok=relay_ok, budget=budget
    )
    status = run_daemon(home, settings)
    if status:
        raise SystemExit(status)


def mount_verbs(arguments: list[str]) -> None:
    """Add the verbs of packages above this one (sim, demo) that are asked for."""
    first = arguments[0] if arguments else "--help"
    for point in entry_points(group="fabric.verbs"):
        if first not in (point.name, "--help", "-h"):
            continue  # importing a verb costs more than most commands
        verb = point.load()
        if isinstance(verb, cyclopts.App):
            app.command(verb, name=point.name)
        else:
            app.command(name=point.name)(verb)


def main() -> None:
    """Run one command; map every refusal to its exit code."""
    arguments = sys.argv[1:]
    json = "--json" in arguments
    try:
        mount_verbs(arguments)
        app(arguments)
    except FabricError as error:
        show_error(error, json=json)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:
        sys.stderr.close()
        raise SystemExit(1) from None


cli_mesh.add_to(app)
cli_trust.add_to(app)
cli_net.add_to(app)
cli_jobs.add_to(app)
cli_plan.add_to(app)
cli_board.add_to(app)
cli_content.add_to(app)

if __name__ == "__main__":
    main()
