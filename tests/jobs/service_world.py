"""The network and the replicated store of several jobs services, in one process."""

from __future__ import annotations

import contextlib

import trio

from fabric.core.errors import NoRoute, PeerTimeout, ResourceExhausted, Unavailable
from fabric.jobs.ports import Left
from fabric.jobs.retirement_service import CLOSED
from fabric.jobs.states import STATUS, fold


class World:
    """The network, the replicated store and the runners' data plane, in one place."""

    def __init__(self):
        self.rpcs = {}
        self.groups = None
        self.specs = {}
        self.statuses = {}
        self.settings = ()
        self.assignments = {}
        self.changed = trio.Event()
        self.runners = {}
        self.checkpoints = {}
        self.saved = []
        self.speed = 1.0
        self.left = Left(1.0, 1.0, 1.0)

    def linked(self, one, other):
        if one not in self.rpcs or other not in self.rpcs:
            return False
        return self.groups is None or any(one in g and other in g for g in self.groups)

    def wake(self):
        self.changed.set()
        self.changed = trio.Event()


class FakeRpc:
    def __init__(self, world, me):
        self.world, self.me, self.handlers = world, me, {}
        self.lost_peers = []

    def register(self, method, handler):
        async def wrapped(sender, raw):
            return handler(sender, raw)

        self.handlers[method] = wrapped

    def register_async(self, method, handler):
        self.handlers[method] = handler

    async def call(self, peer, method, request):
        await trio.sleep(0.01)
        if peer not in self.world.rpcs:
            raise NoRoute("connection refused")
        if not self.world.linked(self.me, peer):
            await trio.sleep(30)
            raise PeerTimeout("silence")
        handler = self.world.rpcs[peer].handlers.get(method)
        if handler is None:
            raise Unavailable("not serving")
        answer = await handler(self.me, request)
        await trio.sleep(0.01)
        if not self.world.linked(self.me, peer):
            raise PeerTimeout("silence")
        return answer

    def connected(self):
        return frozenset()

    def lost(self):
        send, receive = trio.open_memory_channel(64)
        self.lost_peers.append(send)
        return receive

    def break_connection(self, peer):
        for send in self.lost_peers:
            with contextlib.suppress(trio.BrokenResourceError):
                send.send_nowait(peer)

    def rtt_seconds(self, peer):
        return None


class FakeStore:
    def __init__(self, world, me, disk):
        self.world, self.me, self.disk = world, me, disk
        self.full = False

    def specs(self):
        return dict(self.world.specs)

    def status(self, job):
        slots = [raw for (j, _), raw in self.world.statuses.items() if j == job]
        return fold([STATUS.decode_untrusted(raw) for raw in slots])

    def settings(self, job, spec):
        return self.world.settings

    def coordinator(self, job):
        return self.world.assignments.get(job, (0, None))[1]

    def left(self, job):
        return self.world.left

    async def put_spec(self, job, spec):
        self.world.specs[job] = spec
        self.world.wake()

    async def put_status(self, job, status, *, again=False):
        self.world.statuses[job, self.me] = STATUS.encode(status)
        self.world.wake()

    async def put_assignment(self, job, counter, coordinator, participants):
        self.world.assignments[job] = max(
            self.world.assignments.get(job, (0, "")), (counter, coordinator)
        )
        self.world.wake()

    def promise(self, job):
        return self.disk.get(job)

    async def save_promise(self, job, counter, blob):
        if self.full:
            raise ResourceExhausted("the disk is full")
        self.disk[job] = blob

    def promised(self):
        return list(self.disk)

    async def close_promise(self, job):
        self.disk[job] = CLOSED

    async def forget_promises(self, jobs):
        for job in jobs:
            del self.disk[job]

    async def changed(self):
        await self.world.changed.wait()
