"""A race that is over takes nothing more, at whatever moment it is offered."""

import random
import socket

import trio

from nat.punch.config import PunchConfig
from nat.punch.core import SocketAgreement
from nat.punch.port_service import PunchPort
from nat.punch.race_service import PunchRace


async def offer_at_every_step(race, taken, *, task_status):
    """Offer a connection whenever this task runs, until the race refuses one."""
    task_status.started()
    while True:
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        accepted = race.offer(theirs)
        taken.append(accepted)
        ours.close()
        if not accepted:
            theirs.close()
        await trio.lowlevel.checkpoint()


async def test_an_offer_in_the_moment_after_the_race_is_refused():
    agreement = SocketAgreement(initiator=True, own=b"o" * 16, peer=b"p" * 16)
    for steps in range(1, 6):
        taken = []
        with PunchPort() as port:
            rng = random.Random(1)
            race = PunchRace(
                PunchConfig(), port.number, port.listeners, agreement, rng, 0.01, 0
            )
            async with trio.open_nursery() as nursery:
                with trio.CancelScope() as scope:
                    await nursery.start(offer_at_every_step, race, taken)
                    nursery.start_soon(cancel_after, scope, steps)
                    await race.run([])
                for _ in range(3):
                    await trio.lowlevel.checkpoint()
                nursery.cancel_scope.cancel()
        assert taken[-1] is False


async def cancel_after(scope, steps):
    for _ in range(steps):
        await trio.lowlevel.checkpoint()
    scope.cancel()
