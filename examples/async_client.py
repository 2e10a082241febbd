"""Follow two jobs at once from a trio program.

    python examples/async_client.py examples/train.toml train.outer.rounds=5

Submits the job twice, with two seeds, and prints both losses as they come.
"""

import sys

import trio

import fabric
from fabric.app.aclient import AsyncClient

RUN_SECONDS = 600.0


async def follow(f: AsyncClient, spec: str, changes: dict[str, str], seed: int) -> None:
    """Run one job to its end; print what happens."""
    job = await f.submit(spec, set=changes | {"train.seed": seed})
    async for event in job.events():
        if event.kind == "round":
            facts = event.facts
            print(f"seed {seed}: round {facts['round']}: loss {facts['loss']:.3f}")
    print(f"seed {seed}: checkpoint {(await job.result()).facts['checkpoint']}")


async def main(spec: str, changes: list[str]) -> None:
    """Follow the jobs side by side."""
    settings = dict(change.split("=", 1) for change in changes)
    async with fabric.aconnect() as f:
        with trio.fail_after(RUN_SECONDS):
            async with trio.open_nursery() as nursery:
                for seed in (0, 1):
                    nursery.start_soon(follow, f, spec, settings, seed)


if __name__ == "__main__":
    try:
        trio.run(main, sys.argv[1], sys.argv[2:])
    except* fabric.FabricError as group:
        for error in group.exceptions:
            print(error, file=sys.stderr)
        sys.exit(1)
