"""Run one UPnP request in a process that can be ended."""

from __future__ import annotations

import logging
import subprocess
import sys
from typing import Final

import trio

from fabric.core.errors import RemoteProtocolError
from nat.portmap.upnp_messages import (
    MAX_MESSAGE_BYTES,
    UpnpAnswer,
    UpnpFailed,
    UpnpRequest,
)
from nat.portmap.upnp_messages import UpnpSearch as _Search
from nat.portmap.upnp_worker import ANSWERS, REQUESTS

_COMMAND: Final = (sys.executable, "-I", "-P", "-B", "-m", "nat.portmap.upnp_worker")
_KILL_SECONDS = 2.0
_log = logging.getLogger(__name__)


async def call_upnp(request: UpnpRequest, seconds: float) -> UpnpAnswer:
    """Return the answer to ``request``, a failure after ``seconds``.

    After cancellation the process is gone; the router may have done what it was asked.
    """
    port = 0 if isinstance(request, _Search) else request.internal_port
    try:
        with trio.fail_after(seconds):
            data = await _run(REQUESTS.encode(request))
        return ANSWERS.decode_untrusted(data)
    except trio.TooSlowError:
        reason = f"no answer in {seconds:g} s"
    except (OSError, RemoteProtocolError) as exc:
        _log.warning("upnp.worker_failed reason=%s", exc)
        reason = "the UPnP process failed"
    return UpnpFailed(internal_port=port, reason=reason)


async def _run(request: bytes) -> bytes:
    """Return what the process answers, at most one byte more than is allowed."""
    process = await trio.lowlevel.open_process(
        _COMMAND,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={},
    )
    stdin, stdout = process.stdin, process.stdout
    assert stdin is not None, "asked for a pipe"
    assert stdout is not None, "asked for a pipe"
    try:
        await stdin.send_all(request)
        await stdin.aclose()
        answer = bytearray()
        while len(answer) <= MAX_MESSAGE_BYTES:
            chunk = await stdout.receive_some(MAX_MESSAGE_BYTES + 1)
            if not chunk:
                break
            answer += chunk
        return bytes(answer)
    except trio.BrokenResourceError as exc:
        raise OSError("the UPnP process ended early") from exc
    finally:
        process.kill()
        with trio.CancelScope(shield=True), trio.move_on_after(_KILL_SECONDS):
            await process.wait()
            await stdin.aclose()
            await stdout.aclose()
