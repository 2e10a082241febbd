import pytest
from hypothesis import given
from hypothesis import strategies as st

from fabric.core.errors import RemoteProtocolError
from nat.portmap.upnp_ssdp import (
    MAX_BYTES,
    TARGETS,
    check_url_untrusted,
    decode_location_untrusted,
    encode_search,
)

GATEWAY = "192.168.1.1"
URL = "http://192.168.1.1:5000/rootDesc.xml"


def answer(*lines):
    return "\r\n".join(("HTTP/1.1 200 OK", *lines, "", "")).encode()


def test_search_ends_with_an_empty_line():
    data = encode_search(TARGETS[0])
    assert data.startswith(b"M-SEARCH * HTTP/1.1\r\n")
    assert data.endswith(b"InternetGatewayDevice:1\r\n\r\n")


@pytest.mark.parametrize("name", ["LOCATION", "Location", "location "])
def test_location_is_found_in_any_case(name):
    data = answer("ST: x", f"{name}: {URL}", "USN: y")
    assert decode_location_untrusted(data, GATEWAY) == URL


@pytest.mark.parametrize(
    "url",
    [
        "http://192.168.1.66:5000/rootDesc.xml",  # a neighbour
        "http://127.0.0.1:8080/admin",  # ourselves
        "http://192.168.1.1@evil.example/",
        "http://user@192.168.1.1/",
        "https://192.168.1.1/",
        "file:///etc/passwd",
        "http://router.local/",
        "http://192.168.1.1:99999/",
        "http://192.168.1.1:0x50/",
        "http://[192.168.1.1/",
        "http://192.168.1.1/" + "a" * 512,
        "http://192.168.1.1/\x00",
        "",
    ],
)
def test_urls_elsewhere_are_refused(url):
    with pytest.raises(RemoteProtocolError):
        check_url_untrusted(url, GATEWAY)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        answer("ST: x"),
        answer(f"LOCATION: {URL}").replace(b"200", b"500"),
        answer("X: é"),
        answer("X: " + "y" * MAX_BYTES, f"LOCATION: {URL}"),
        b"NOTIFY * HTTP/1.1\r\nLOCATION: " + URL.encode() + b"\r\n\r\n",
    ],
)
def test_answers_that_are_none_are_refused(data):
    with pytest.raises(RemoteProtocolError):
        decode_location_untrusted(data, GATEWAY)


@given(st.one_of(st.binary(), st.text().map(lambda text: answer(f"LOCATION: {text}"))))
def test_door(data):
    try:
        url = decode_location_untrusted(data, GATEWAY)
    except RemoteProtocolError:
        return
    assert "192.168.1.1" in url


@given(st.text())
def test_url_door(url):
    try:
        assert check_url_untrusted(url, GATEWAY) == url
    except RemoteProtocolError:
        return
