from types import SimpleNamespace

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from fabric.core.errors import PeerTimeout, Unavailable
from fabric.core.ids import PeerId
from inference.config import InferenceConfig
from inference.messages import ServedModel, SessionToken
from inference.session_service import GatewaySessions, Generation

ME = PeerId("me")
MODEL = ServedModel("job", "tiny", ME, 100)


class NoService:
    """A daemon without stages that remembers what it is told to stop."""

    def __init__(self):
        self.stopped = []

    def deliver_to(self, gateway):
        pass

    def models(self):
        return ()

    async def stop(self, caller, request):
        await trio.lowlevel.checkpoint()
        self.stopped.append(request.session)


def sessions(**config):
    service = NoService()
    rpc = SimpleNamespace(connected=frozenset)
    config = InferenceConfig(**config)
    return GatewaySessions(config, ME, rpc, service), service


@given(st.permutations(range(6)), st.lists(st.integers(0, 5), max_size=10))
def test_tokens_of_two_stages_are_put_in_order_once(order, repeats):
    tokens = [
        SessionToken("s", i, 65 + i, "length" if i == 5 else "") for i in range(6)
    ]

    async def main():
        owner, _ = sessions()
        generation = Generation(owner, MODEL, "s", 6)
        for index in [*repeats[:5], *order, *repeats]:
            generation.feed(tokens[index])
        generation.feed(SessionToken("s", 2**30, 1))
        got = [await generation.next_token() for _ in range(6)]
        assert got == tokens
        await generation.aclose()

    trio.run(main)


async def test_silence_is_a_timeout_and_cancels(autojump_clock):
    owner, service = sessions(token_timeout_seconds=5)
    generation = Generation(owner, MODEL, "s", 6)
    with pytest.raises(PeerTimeout):
        await generation.next_token()
    assert trio.current_time() >= 5
    await generation.aclose()
    assert service.stopped == ["s"]


async def test_an_error_from_the_mesh_is_raised():
    owner, _ = sessions()
    generation = Generation(owner, MODEL, "s", 6)
    generation.feed(SessionToken("s", 0, 65))
    generation.feed(SessionToken("s", 0, -1, "error"))
    assert (await generation.next_token()).token == 65
    with pytest.raises(Unavailable):
        await generation.next_token()
    await generation.aclose()


async def test_a_finished_session_is_not_cancelled():
    owner, service = sessions()
    generation = Generation(owner, MODEL, "s", 1)
    generation.feed(SessionToken("s", 0, 65, "length"))
    await generation.next_token()
    await generation.aclose()
    assert service.stopped == []
