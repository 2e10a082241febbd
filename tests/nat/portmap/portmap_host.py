"""A host behind a router: maps ports and says so, one JSON line per event.

Started by the tests inside a namespace; its standard input says "change" (the network
changed) or ends (leave). Each mapped port answers connections with its number.
"""

import argparse
import json
import sys

import msgspec
import trio

from nat.portmap.api import Explained, Lost, Mapped
from nat.portmap.config import PortMapConfig
from nat.portmap.lease import WantedPort
from nat.portmap.service import open_port_mapping


def say(**fields):
    print(json.dumps(fields), flush=True)


def tell(event):
    match event:
        case Mapped(mapping):
            say(event="mapped", **msgspec.to_builtins(mapping))
        case Lost(mapping, reason):
            say(event="lost", reason=reason, **msgspec.to_builtins(mapping))
        case Explained(finding):
            say(event="explained", **msgspec.to_builtins(finding))


async def answer_with_port(port, *, task_status):
    async def answer(stream):
        async with stream:
            await stream.send_all(str(port).encode())

    await trio.serve_tcp(answer, port, task_status=task_status)


async def tell_events(events):
    async for event in events:
        tell(event)


async def obey(service, scope):
    stdin = trio.lowlevel.FdStream(sys.stdin.fileno())
    async for line in stdin:
        if line.strip() == b"change":
            service.on_network_change()
    scope.cancel()


async def main(config, ports):
    async with trio.open_nursery() as nursery:
        for port in ports:
            await nursery.start(answer_with_port, port)
        wanted = [WantedPort(internal_port=port) for port in ports]
        async with open_port_mapping(config, wanted) as service:
            async with trio.open_nursery() as inner:
                inner.start_soon(tell_events, service.events())
                await obey(service, inner.cancel_scope)
        while True:
            try:
                tell(service.events().receive_nowait())
            except trio.WouldBlock:
                break
        say(event="closed")
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", default="{}")
    parser.add_argument("ports", nargs="+", type=int)
    given = parser.parse_args()
    settings = msgspec.json.decode(given.config, type=PortMapConfig)
    trio.run(main, settings, given.ports)
