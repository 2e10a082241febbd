import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fabric.core.errors import (
    PeerTimeout,
    RemoteRefused,
    ResourceExhausted,
    Unavailable,
)
from inference import openai_api as api


def body(**fields):
    return json.dumps({"model": "m", "prompt": "hello", **fields}).encode()


def chat_body(**fields):
    messages = [{"role": "user", "content": "hi"}]
    return json.dumps({"model": "m", "messages": messages, **fields}).encode()


def test_defaults():
    request = api.parse_untrusted(body(), chat=False)
    assert request.prompt == tuple(b"hello")
    assert (request.max_tokens, request.temperature, request.stream) == (16, 1.0, False)
    assert api.parse_untrusted(chat_body(), chat=True).max_tokens == 0


def test_chat_parts_and_limits():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    data = chat_body(
        messages=[{"role": "user", "content": parts}],
        max_completion_tokens=5,
        stop="x",
        seed=-1,
        stream=True,
        stream_options={"include_usage": True},
    )
    request = api.parse_untrusted(data, chat=True)
    assert bytes(request.prompt) == b"user: ab\nassistant:"
    assert (request.max_tokens, request.stop, request.include_usage) == (
        5,
        ("x",),
        True,
    )
    assert api.sampling_of(request, 100, 1).seed == 2**53 - 1


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": 3}, "prompt"),
        ({"model": None}, "model"),
        ({"temperature": 9}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"top_p": 0}, "top_p"),
        ({"n": 2}, "n"),
        ({"tools": [{}]}, "tools"),
        ({"logprobs": 1}, "logprobs"),
        ({"prompt": ""}, "prompt"),
        ({"stop": ["a"] * 9}, "stop"),
    ],
)
def test_a_refusal_names_the_field(fields, param):
    with pytest.raises(api.ApiError) as caught:
        api.parse_untrusted(body(**fields), chat=False)
    assert caught.value.status == 400
    assert caught.value.body["error"]["param"] == param


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=100), st.booleans())
def test_any_bytes_give_a_request_or_an_api_error(data, chat):
    with pytest.raises(api.ApiError):
        api.parse_untrusted(data, chat=chat)


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["model", "prompt", "messages", "stop", "stream", "seed", "n"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(max_size=5),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(st.sampled_from(["role", "content", "type"]), inner)
            ),
            max_leaves=6,
        ),
    )
)
def test_any_json_gives_a_request_or_an_api_error(value):
    for chat in (False, True):
        try:
            request = api.parse_untrusted(json.dumps(value).encode(), chat=chat)
        except api.ApiError as exc:
            status = exc.status
        else:
            status = 400 if request.prompt else 0
        assert status == 400


def test_nesting_and_surrogates_are_refused():
    for data in (b"[" * 100_000, b'{"model":"m","prompt":"\\ud800"}', b"\xff"):
        with pytest.raises(api.ApiError):
            api.parse_untrusted(data, chat=False)


def test_the_context_is_a_limit():
    request = api.parse_untrusted(body(max_tokens=6), chat=False)
    assert api.sampling_of(request, 11, 0).max_tokens == 6
    with pytest.raises(api.ApiError) as caught:
        api.sampling_of(request, 10, 0)
    assert caught.value.code == "context_length_exceeded"
    chat = api.parse_untrusted(chat_body(), chat=True)
    assert api.sampling_of(chat, 100, 0).max_tokens == 100 - len(chat.prompt)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ResourceExhausted("x"), 429),
        (RemoteRefused("x", code="E_BUSY"), 429),
        (RemoteRefused("x", code="E_CONTEXT"), 400),
        (Unavailable("x"), 503),
        (PeerTimeout("x"), 503),
    ],
)
def test_our_errors_in_http_terms(error, status):
    assert api.error_of(error).status == status
