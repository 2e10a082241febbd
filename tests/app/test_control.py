"""The control API over a real Unix socket: answers, refusals, bugs, lost clients."""

import socket
import stat

import pytest
import trio

from fabric.app import control_messages as m
from fabric.app.aclient import AsyncClient
from fabric.app.client import Client
from fabric.app.control_server import serve_control
from fabric.core.errors import ConfigError, PeerTimeout, RemoteRefused, Unavailable
from fabric.core.framing import encode_frame
from fabric.core.telemetry import Counters


class Daemon:
    def __init__(self):
        self.counters = Counters()
        self.cancelled = trio.Event()

    async def answer(self, request):
        match request:
            case m.Submit(spec):
                yield m.Line(spec.decode())
            case m.Jobs():
                for i in range(3):
                    yield m.Line(str(i))
            case m.Join(token):
                raise RemoteRefused(f"bad {token}", code="E_X", next_step="go home")
            case m.Status():
                raise trio.TooSlowError
            case m.Down():
                raise KeyError("a bug")
            case m.JobEvents():
                try:
                    yield m.Line("first")
                    await trio.sleep_forever()
                finally:
                    self.cancelled.set()


@pytest.fixture
async def daemon(tmp_path, nursery):
    daemon = Daemon()
    daemon.path = tmp_path / "control.sock"
    await nursery.start(serve_control, daemon.path, daemon.answer, daemon.counters)
    return daemon


async def sync(function, *args):
    with trio.fail_after(5):
        return await trio.to_thread.run_sync(function, *args)


def echo(client, text):
    return client.one(m.Submit(text.encode()), m.Line).text


async def test_socket_is_private(daemon):
    assert stat.S_IMODE(daemon.path.stat().st_mode) == 0o600


async def test_one_and_many_answers(daemon):
    client = Client(daemon.path)
    assert await sync(echo, client, "lab") == "lab"
    texts = await sync(lambda: [t.text for t in client.items(m.Jobs(), m.Line)])
    assert texts == ["0", "1", "2"]
    answer = await AsyncClient(daemon.path).one(m.Submit(b"lab"), m.Line)
    assert answer.text == "lab"


async def test_refusal_keeps_class_code_and_next_step(daemon):
    with pytest.raises(RemoteRefused) as caught:
        await sync(Client(daemon.path).join, "t")
    error = caught.value
    assert (error.code, error.reason, error.next_step) == ("E_X", "bad t", "go home")
    assert error.exit_code == 4


async def test_bug_is_reported_counted_and_survived(daemon):
    with pytest.raises(Exception, match="KeyError") as caught:
        await sync(Client(daemon.path).down)
    assert caught.value.code == "E_BUG"
    assert daemon.counters.snapshot() == {"bugs_total:control": 1}
    assert await sync(echo, Client(daemon.path), "still here") == "still here"


async def test_a_peer_that_is_too_slow_is_a_timeout(daemon):
    with pytest.raises(PeerTimeout) as caught:
        await sync(Client(daemon.path).status)
    assert caught.value.exit_code == 7


async def test_hanging_up_cancels_the_request(daemon):
    def first_only():
        events = Client(daemon.path).items(m.JobEvents("j"), m.Line)
        assert next(events).text == "first"
        events.close()

    await sync(first_only)
    with trio.fail_after(5):
        await daemon.cancelled.wait()


@pytest.mark.parametrize(
    "data", [b"\xff\xff\xff\xff", encode_frame(b"nonsense"), b"\x00"], ids=repr
)
async def test_garbage_harms_nobody(daemon, data):
    def send():
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(5)
            sock.connect(str(daemon.path))
            sock.sendall(data)

    await sync(send)
    assert await sync(echo, Client(daemon.path), "x") == "x"


async def test_no_daemon(tmp_path):
    with pytest.raises(Unavailable) as caught:
        await sync(Client(tmp_path / "none.sock").status)
    assert caught.value.code == "E_NO_DAEMON"
    assert caught.value.next_step == "start one with `fabric up`"
    with pytest.raises(Unavailable):
        await AsyncClient(tmp_path / "none.sock").status()


async def test_stale_socket_file_is_replaced(tmp_path, nursery):
    path = tmp_path / "control.sock"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
    daemon = Daemon()
    await nursery.start(serve_control, path, daemon.answer, daemon.counters)
    assert await sync(echo, Client(path), "x") == "x"


async def test_unwritable_folder(tmp_path, nursery):
    with pytest.raises(ConfigError, match="cannot listen"):
        await serve_control(tmp_path / "none" / "c.sock", Daemon().answer, Counters())
