"""The race of paths, in virtual time: who starts when, who wins, what is said."""

import socket

import pytest
import trio
import trio.testing

from fabric.core.errors import NoRoute, RemoteProtocolError, RemoteRefused
from fabric.net import path_race
from fabric.net.path_race import PUNCH_AFTER_SECONDS, open_path
from fabric.net.ports import ALL_PATHS, BETTER_THAN_RELAY

PEER = "12D3KooWLhKX3GHCwEWGT16zo9UbXzcb5DwurmsCyXnRkcaQ7qru"


class Provider:
    """Each kind takes its time, or fails with an error; notes when it began."""

    def __init__(self, **takes):
        self.takes = takes
        self.began = {}
        self.made = []

    def rank(self, peer, addresses):
        return tuple(addresses)

    async def _run(self, kind):
        self.began[kind] = trio.current_time() - self.start
        takes = self.takes[kind]
        if isinstance(takes, Exception):
            raise takes
        await trio.sleep(takes)
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        self.made += [ours, theirs]
        return ours

    def claim(self, label, sock):
        return False

    async def punch(self, peer):
        return await self._run("punched")

    async def circuit(self, peer):
        return await self._run("relay")

    async def direct(self, targets, second=()):
        sock = await self._run("direct")
        return trio.socket.from_stdlib_socket(sock)

    def close(self):
        for sock in self.made:
            sock.close()


@pytest.fixture
def race(monkeypatch):
    providers = []

    async def run(kinds=ALL_PATHS, relay_after=2.0, addresses=("1.1.1.1:1",), **takes):
        provider = Provider(**takes)
        providers.append(provider)
        provider.start = trio.current_time()
        monkeypatch.setattr(path_race, "connect_any", provider.direct)
        sock, kind = await open_path(
            PEER, addresses, provider, relay_after_seconds=relay_after, kinds=kinds
        )
        sock.close()
        return kind, provider.began, trio.current_time() - provider.start

    yield run
    for provider in providers:
        provider.close()


async def test_a_quick_dial_starts_nothing_else(race, autojump_clock):
    kind, began, took = await race(direct=0.1, punched=0.1, relay=0.1)
    assert (kind, set(began), took) == ("direct", {"direct"}, pytest.approx(0.1))


async def test_a_silent_address_does_not_hold_the_punch_back(race, autojump_clock):
    kind, began, _ = await race(direct=60, punched=0.1, relay=0.1)
    assert kind == "punched"
    assert began["punched"] == pytest.approx(PUNCH_AFTER_SECONDS)
    assert "relay" not in began


async def test_what_fails_at_once_starts_the_next_at_once(race, autojump_clock):
    no = NoRoute("refused")
    kind, began, took = await race(direct=no, punched=no, relay=0.1)
    assert kind == "relay"
    assert began["relay"] == pytest.approx(0.0)
    assert took == pytest.approx(0.1)


async def test_the_relay_waits_for_a_slow_punch_only_so_long(race, autojump_clock):
    kind, began, _ = await race(direct=60, punched=60, relay=0.1, relay_after=2.0)
    assert kind == "relay"
    assert began["relay"] == pytest.approx(2.0)


async def test_kinds_that_are_not_wanted_are_not_tried(race, autojump_clock):
    with pytest.raises(NoRoute, match="symmetric"):
        await race(BETTER_THAN_RELAY, direct=NoRoute("x"), punched=NoRoute("symmetric"))


async def test_the_error_names_every_kind_and_the_next_step(race, autojump_clock):
    with pytest.raises(NoRoute) as info:
        await race(
            direct=NoRoute("refused"),
            punched=NoRoute("both are symmetric"),
            relay=NoRoute("no relay", next_step="start a relay"),
        )
    for reason in ("refused", "both are symmetric", "no relay"):
        assert reason in info.value.reason
    assert info.value.next_step == "start a relay"


async def test_no_address_goes_straight_to_the_punch(race, autojump_clock):
    kind, began, _ = await race(addresses=(), direct=0.1, punched=0.1, relay=0.1)
    assert kind == "punched"
    assert began["punched"] == pytest.approx(0.0)


async def test_a_relays_refusal_is_kept(race, autojump_clock):
    with pytest.raises(Exception, match="budget") as info:
        await race(
            direct=NoRoute("x"), punched=NoRoute("y"), relay=RemoteRefused("budget")
        )
    assert info.value.code


async def test_a_malformed_address_is_the_peers_fault(race, autojump_clock):
    with pytest.raises(RemoteProtocolError):
        await race(addresses=("nonsense",), direct=0.1, punched=0.1, relay=0.1)


async def test_a_winner_is_closed_when_the_caller_is_cancelled_meanwhile(
    race, autojump_clock
):
    """The losers take their time to end, and the caller gives up in between."""
    made = []

    class Slow(Provider):
        async def punch(self, peer):
            made.append(await super().punch(peer))
            return made[0]

        async def circuit(self, peer):
            try:
                await trio.sleep_forever()
            finally:
                with trio.CancelScope(shield=True):
                    await trio.sleep(5)

    provider = Slow(punched=1.0)
    provider.start = trio.current_time()
    with trio.move_on_after(3) as scope:
        await open_path(PEER, (), provider, relay_after_seconds=0.3)
    assert scope.cancelled_caught
    assert made[0].fileno() == -1
    provider.close()
