from hypothesis import given
from hypothesis import strategies as st

from inference.text import TextStream, encode, render_chat


@given(st.text(max_size=50))
def test_tokens_and_back(text):
    text = text.encode(errors="replace").decode()
    stream = TextStream()
    pieces = [stream.feed(token) for token in encode(text)]
    assert "".join(pieces) + stream.finish() == text


@given(
    st.text("ab", max_size=30),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
def test_a_stop_string_cuts_wherever_it_begins(text, stops):
    stream = TextStream(stops)
    out = "".join(stream.feed(token) for token in encode(text)) + stream.finish()
    # The earliest end of a stop decides when; the earliest begin decides where.
    whole = [text.find(stop) for stop in stops if stop in text]
    assert stream.stopped == bool(whole)
    assert text.startswith(out)
    assert not any(stop in out for stop in stops)
    if not whole:
        assert out == text


def test_invalid_bytes_are_replaced():
    stream = TextStream()
    assert stream.feed(0xFF) + stream.feed(ord("a")) == "\ufffda"
    assert stream.feed(0xE2) == ""
    assert stream.finish() == "\ufffd"


def test_the_template():
    messages = [("system", "Be brief."), ("user", "Hi")]
    assert render_chat(messages) == "system: Be brief.\nuser: Hi\nassistant:"
