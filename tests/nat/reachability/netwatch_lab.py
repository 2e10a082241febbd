"""Change a network and print what the watcher says: in a namespace of its own, as root.

Prints a JSON list: per step its name, what changed, and how soon it was told.
"""

import json
import subprocess

import trio

from fabric.core.telemetry import Counters
from nat.reachability.netwatch_service import open_netwatch

SETUP = (
    "link set lo up",
    "link add v0 type veth peer name v1",
    "addr add 10.9.0.2/24 dev v0",
    "link set v0 up",
    "link set v1 up",
    "route add default via 10.9.0.1",
    "neigh replace 10.9.0.1 lladdr 02:00:00:00:00:01 dev v0 nud permanent",
)
STEPS = {
    "address": "addr add 10.9.0.7/24 dev v0",
    "gone": "addr del 10.9.0.7/24 dev v0",
    "other machine": (
        "neigh replace 10.9.0.1 lladdr 02:00:00:00:00:99 dev v0 nud permanent"
    ),
    "gateway": "route replace default via 10.9.0.3",
    "cable": "link set v1 down",
}
QUIET = (
    "neigh replace 10.9.0.77 lladdr 02:00:00:00:00:77 dev v0 nud permanent",
    "route add 10.77.0.0/16 via 10.9.0.3",
    "neigh del 10.9.0.3 dev v0",
)


def ip(command, check=True):
    subprocess.run(["ip", *command.split()], check=check)


async def scenario():
    told = []
    async with open_netwatch(Counters()) as watcher:
        changes = watcher.changes()
        with trio.move_on_after(2.5):  # duplicate address detection of IPv6
            await changes.receive()
        for name, command in STEPS.items():
            began = trio.current_time()
            ip(command)
            with trio.fail_after(10):
                changed = await changes.receive()
            told.append(
                {
                    "step": name,
                    "seconds": trio.current_time() - began,
                    "gone": sorted(changed.gone_addresses),
                    "new": sorted(changed.new_addresses),
                    "gateway": changed.gateway_changed,
                }
            )
            if name == "gateway":
                for quiet in QUIET:
                    ip(quiet, check=False)
                with trio.move_on_after(1.5) as waited:
                    told.append({"unexpected": repr(await changes.receive())})
                assert waited.cancelled_caught
        told.append({"addresses": sorted(watcher.view().addresses)})
    print(json.dumps(told))


if __name__ == "__main__":
    for command in SETUP:
        ip(command)
    trio.run(scenario)
