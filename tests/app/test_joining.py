"""Joining asks every member of the invite at once; the first yes wins."""

import pytest
import trio

from fabric.app.joining import REFUSAL_GRACE_SECONDS, join_any
from fabric.core.errors import IntegrityError, NoRoute, RemoteRefused
from fabric.core.ids import PeerId

YES, NO, DEAD, SLOW = (PeerId(name) for name in ("yes", "no", "dead", "slow"))


def addr(peer, port=1):
    return f"/ip4/192.0.2.1/tcp/{port}/p2p/{peer}"


class Members:
    """Members that answer as their name says."""

    def __init__(self):
        self.asked, self.cancelled = {}, []

    async def admit(self, peer, addrs):
        self.asked[peer] = list(addrs)
        try:
            await self.answer(peer)
        except trio.Cancelled:
            self.cancelled.append(peer)
            raise

    async def answer(self, peer):
        if peer == YES:
            await trio.sleep(1)
        elif peer == SLOW:
            await trio.sleep(3600)
        elif peer == DEAD:
            raise NoRoute("connection refused")
        elif peer == "thief":
            raise IntegrityError("answered, but not as thief", code="E_WRONG_PEER")
        else:
            later = 5 if peer == "busy" else 0
            raise RemoteRefused(
                f"{peer} says no", code="E_NOT_MEMBER", retry_after_seconds=later
            )

    async def join(self, *addrs):
        return await join_any(addrs, self.admit, seconds=10)


async def test_the_first_yes_wins_and_ends_the_others(autojump_clock):
    members, start = Members(), trio.current_time()
    found = await members.join(addr(SLOW), addr(DEAD), addr(YES), addr(YES, 2))
    assert found == YES
    assert trio.current_time() - start < 1.1
    assert members.cancelled == [SLOW]
    assert members.asked[YES] == [addr(YES), addr(YES, 2)]


async def test_a_no_waits_for_a_yes_but_not_for_silence(autojump_clock):
    assert await Members().join(addr(NO), addr(YES)) == YES
    start = trio.current_time()
    with pytest.raises(RemoteRefused) as error:
        await Members().join(addr(NO), addr(SLOW))
    assert error.value.code == "E_NOT_MEMBER"
    assert trio.current_time() - start <= REFUSAL_GRACE_SECONDS + 0.1


async def test_when_everybody_reachable_says_no_it_ends_at_once(autojump_clock):
    start = trio.current_time()
    with pytest.raises(RemoteRefused) as error:
        await Members().join(addr("busy"), addr(NO), addr(DEAD))
    assert error.value.reason == "no says no"
    assert trio.current_time() - start < 0.1


async def test_nobody_answers_lists_each_address_and_why(autojump_clock):
    with pytest.raises(NoRoute) as error:
        await Members().join(addr(DEAD, 7), addr(SLOW), addr("thief"))
    for fact in (addr(DEAD, 7), "refused", addr(SLOW), "E_TIMEOUT", "E_WRONG_PEER"):
        assert fact in error.value.reason
    assert error.value.next_step


async def test_an_invite_without_addresses():
    with pytest.raises(NoRoute):
        await Members().join()


async def test_cancelling_asks_nobody_any_more(autojump_clock):
    members = Members()
    with trio.move_on_after(2) as scope:
        await members.join(addr(SLOW))
    assert scope.cancelled_caught
    assert members.cancelled == [SLOW]
