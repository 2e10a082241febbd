"""Submit a job to the local daemon and follow it to its checkpoint.

    python examples/client.py examples/train.toml train.outer.rounds=5

The daemon is this user's, or the one in $FABRIC_HOME.
"""

import sys

import fabric


def main(spec: str, *changes: str) -> None:
    """Submit ``spec`` with ``key=value`` changes; print its rounds and its result."""
    with fabric.connect() as f:
        print(f"{f.status().name} is in mesh {f.status().mesh_name}")
        job = f.submit(spec, set=dict(change.split("=", 1) for change in changes))
        for event in job.events():
            if event.kind == "round":
                print(f"round {event.facts['round']}: loss {event.facts['loss']:.3f}")
        print(f"checkpoint {job.result().facts['checkpoint']}")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except fabric.FabricError as error:
        sys.exit(f"{error.code}: {error.reason}\nnext: {error.next_step}")
