import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fabric.core.errors import RemoteProtocolError
from inference import messages, worker_messages

CODECS = [
    messages.CODEC,
    worker_messages.COMMANDS,
    worker_messages.EVENTS,
    worker_messages.ACTIVATIONS,
    worker_messages.FEEDBACK,
]


@pytest.mark.parametrize("codec", CODECS)
def test_any_bytes_give_a_message_or_one_error(codec):
    @settings(max_examples=40, deadline=None)
    @given(st.binary(max_size=100))
    def check(data):
        try:
            codec.decode_untrusted(data)
        except RemoteProtocolError:
            return

    check()
