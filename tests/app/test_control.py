"""The control API over a real Unix socket: answers, refusals, bugs, lost clients."""

import os
import re
import socket
import stat
import subprocess
import sys

import pytest
import trio

from fabric.app import control_messages as m
from fabric.app.aclient import AsyncClient
from fabric.app.bugs import log_place
from fabric.app.client import Client
from fabric.app.control_client import Exchange
from fabric.app.control_server import serve_control
from fabric.core.errors import (
    ConfigError,
    FabricError,
    PeerTimeout,
    RemoteRefused,
    Unavailable,
)
from fabric.core.framing import encode_frame
from fabric.core.telemetry import Counters


async def break_down(text):
    raise KeyError(text)


async def break_when_cancelled(waiting):
    waiting.set()
    try:
        await trio.sleep_forever()
    finally:
        raise KeyError("while cancelled")


class Daemon:
    def __init__(self):
        self.counters = Counters()
        self.cancelled = trio.Event()
        self.waiting = trio.Event()

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
            case m.Leave():
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(break_down, "first")
                    nursery.start_soon(break_down, "second")
            case m.Why():
                async with trio.open_nursery():
                    raise RemoteRefused("no", code="E_X", next_step="go home")
            case m.ContentList():
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(break_when_cancelled, self.waiting)
                    await trio.sleep_forever()
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
    assert caught.value.reason == "a bug in `Down`: KeyError: 'a bug'"
    assert daemon.counters.snapshot() == {"bugs_total:control": 1}
    assert await sync(echo, Client(daemon.path), "still here") == "still here"


async def test_a_bug_in_a_nursery_names_its_causes_and_the_log(daemon, caplog):
    with pytest.raises(FabricError) as caught:
        await sync(Client(daemon.path).leave)
    told = caught.value
    assert told.code == "E_BUG"
    assert told.reason.startswith("a bug in `Leave`: ")
    assert "KeyError: 'first'" in told.reason
    assert "KeyError: 'second'" in told.reason
    assert "ExceptionGroup" not in told.reason
    (record,) = [r for r in caplog.records if r.message.startswith("control.bug")]
    assert record.exc_info is not None
    bug = re.search(r"under (id=[0-9a-f]{8});", told.next_step).group(1)
    assert bug in record.message
    assert log_place() in told.next_step


async def test_a_refusal_in_a_nursery_stays_a_refusal(daemon):
    with pytest.raises(RemoteRefused) as caught:
        await sync(Client(daemon.path).why, "x")
    assert (caught.value.code, caught.value.next_step) == ("E_X", "go home")
    assert daemon.counters.snapshot() == {}


async def test_a_bug_while_the_client_hangs_up_is_survived(daemon):
    def ask_and_hang_up():
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(daemon.path))
            sock.sendall(Exchange(m.ContentList()).request)
            trio.from_thread.run(daemon.waiting.wait)

    await sync(ask_and_hang_up)
    with trio.fail_after(5):
        while not daemon.counters.snapshot():
            await trio.lowlevel.checkpoint()
    assert await sync(echo, Client(daemon.path), "still here") == "still here"


def test_the_place_of_the_log_is_a_file_if_it_is_one(tmp_path):
    path = tmp_path / "daemon.log"
    with path.open("w") as log:
        code = "from fabric.app.bugs import log_place; print(log_place())"
        done = subprocess.run(
            [sys.executable, "-c", code],
            stderr=log,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            env={**os.environ, "JOURNAL_STREAM": ""},
        )
    assert done.stdout.strip() == str(path)


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
