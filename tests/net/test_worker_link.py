import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import trio

from fabric.bulk.stderr_tail import MAX_LOG_BYTES
from fabric.core.errors import LocalProtocolError, Unavailable
from fabric.net.worker_api import MAX_WORKER_FRAME, WorkerLimits
from fabric.net.worker_link import open_program, open_worker

SCRIPTS = Path(__file__).parent / "worker_scripts"


def echo_worker(scratch, *args):
    limits = WorkerLimits(scratch=scratch)
    return open_program([str(SCRIPTS / "echo.py")], args, limits)


async def ask(link, frame, fds=()):
    with trio.fail_after(10):
        await link.send(frame, fds)
        return await link.receive()


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


async def test_frames_arguments_and_descriptors(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "do not inherit")
    async with echo_worker(tmp_path, "a", "b") as link:
        big = bytes(range(256)) * 8192
        assert await ask(link, b"hello") == b"hello"
        assert await ask(link, big) == big
        assert await ask(link, b"args") == b"('a', 'b')"
        assert await ask(link, b"modules") == b""
        environment = (await ask(link, b"environment")).decode().split(",")
        assert "SECRET_TOKEN" not in environment
        assert "OMP_WAIT_POLICY" in environment
        read_end, write_end = os.pipe()
        assert await ask(link, b"write", [write_end]) == b"written"
        os.close(write_end)
        assert os.read(read_end, 100) == b"from the worker"
        os.close(read_end)
        with pytest.raises(LocalProtocolError):
            await link.send(bytes(MAX_WORKER_FRAME + 1))
        pid = link.pid
    assert not alive(pid)


async def test_leaving_kills_a_hung_worker_within_the_grace(tmp_path):
    with trio.CancelScope() as scope:
        async with echo_worker(tmp_path) as link:
            await ask(link, b"up")
            await link.send(b"hang")
            pid = link.pid
            began = time.monotonic()
            scope.cancel()
            await trio.sleep_forever()
    assert scope.cancelled_caught
    assert time.monotonic() - began < 1.0
    assert not alive(pid)


async def test_the_reason_holds_status_and_last_words(tmp_path):
    async with echo_worker(tmp_path) as link:
        with pytest.raises(Unavailable, match=r"status 1: no reason to live") as caught:
            await ask(link, b"die")
        assert caught.value.code == "E_WORKER_EXITED"
        with pytest.raises(Unavailable):
            await link.send(b"again")
    assert "no reason" in (tmp_path / "worker.log").read_text()


async def test_the_log_is_bounded(tmp_path):
    async with echo_worker(tmp_path) as link:
        assert await ask(link, b"flood") == b"flooded"
    assert (tmp_path / "worker.log").stat().st_size <= MAX_LOG_BYTES


async def test_a_cancelled_send_breaks_the_link_for_good(tmp_path):
    async with echo_worker(tmp_path) as link:
        await ask(link, b"up")
        await link.send(b"hang")
        with trio.move_on_after(0.1) as scope:
            await link.send(bytes(MAX_WORKER_FRAME))
        assert scope.cancelled_caught
        with pytest.raises(Unavailable, match="cut off"):
            await link.send(b"after")


async def test_a_missing_module_is_explained(tmp_path):
    limits = WorkerLimits(scratch=tmp_path)
    async with open_worker("no_such_worker_module", [], limits) as link:
        with pytest.raises(Unavailable, match="no_such_worker_module"):
            with trio.fail_after(10):
                await link.receive()


async def test_a_worker_dies_with_a_killed_daemon(tmp_path):
    daemon = subprocess.Popen(  # noqa: ASYNC220 - waits for one line
        [sys.executable, SCRIPTS / "parent.py", SCRIPTS / "echo.py", tmp_path],
        stdout=subprocess.PIPE,
        text=True,
    )
    with daemon:
        pid = int(daemon.stdout.readline())
        assert alive(pid)
        daemon.send_signal(signal.SIGKILL)
    with trio.fail_after(5):
        while alive(pid):  # noqa: ASYNC110 - a process has no event for us
            await trio.sleep(0.01)
