import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fabric.core.errors import RemoteProtocolError
from training.messages import (
    COMMAND,
    EVENT,
    EXCHANGE,
    Contribution,
    Failed,
    StateBlockRequest,
    max_exchange_payload,
)


@pytest.mark.parametrize("codec", [COMMAND, EVENT, EXCHANGE])
@given(data=st.binary(max_size=200))
def test_any_bytes_are_a_message_or_a_protocol_error(codec, data):
    with contextlib.suppress(RemoteProtocolError):
        codec.decode_untrusted(data)


@pytest.mark.parametrize(
    "message",
    [
        Contribution(1, 2, 0),
        StateBlockRequest("ab", -1),
        StateBlockRequest("x" * 65, 0),
    ],
)
def test_values_out_of_bounds_are_refused(message):
    with pytest.raises(RemoteProtocolError):
        EXCHANGE.decode_untrusted(EXCHANGE.encode(message))


def test_messages_come_back_as_they_went():
    for message in (Contribution(3, 1, 512), StateBlockRequest("ab" * 32, 7)):
        assert EXCHANGE.decode_untrusted(EXCHANGE.encode(message)) == message
    failed = Failed("E_DIVERGED", "not finite", may_restart=False)
    assert EVENT.decode_untrusted(EVENT.encode(failed)) == failed


def test_the_largest_payload_covers_every_kind():
    assert max_exchange_payload(10, 1) == 1 << 20
    assert max_exchange_payload(5 << 20, 1) == 5 << 20
    assert max_exchange_payload(10, 1 << 20) == 32 << 20
