"""The wire of the control API as a client sees it, without I/O."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import msgspec

from fabric.app.control_messages import (
    MAX_CONTROL_BYTES,
    REPLIES,
    REQUESTS,
    Done,
    Failed,
    Item,
    Request,
)
from fabric.core import errors
from fabric.core.framing import FrameReader, encode_frame

T = TypeVar("T")


class Exchange:
    """One request and its answers: bytes out, bytes in, items out."""

    def __init__(self, request: Request) -> None:
        self.request = encode_frame(REQUESTS.encode(request))
        self._frames = FrameReader(max_bytes=MAX_CONTROL_BYTES)
        self.done = False

    def receive(self, data: bytes) -> Iterator[bytes]:
        """Yield the encoded items completed by ``data`` (empty = end of stream).

        Raises:
            FabricError: the daemon's refusal, as the class it was there.
            Unavailable: the daemon went away in the middle.
        """
        if not data:
            raise errors.Unavailable(
                "the daemon closed the connection",
                next_step="see its log: `fabric status` says where it would be",
            )
        for frame in self._frames.feed(data):
            match REPLIES.decode_untrusted(frame):
                case Item(value):
                    yield value
                case Done():
                    self.done = True
                case Failed() as failed:
                    self.done = True
                    raise error_of(failed)


def error_of(failed: Failed) -> errors.FabricError:
    """Return the exception that ``failed`` describes."""
    kind = getattr(errors, failed.kind, errors.FabricError)
    if not (isinstance(kind, type) and issubclass(kind, errors.FabricError)):
        kind = errors.FabricError
    error = kind(failed.reason, code=failed.code, next_step=failed.next_step)
    error.exit_code = failed.exit_code
    return error


def failed_of(error: errors.FabricError) -> Failed:
    """Return the message that carries ``error`` to a client."""
    return Failed(
        code=error.code,
        reason=error.reason,
        next_step=error.next_step,
        kind=type(error).__name__,
        exit_code=error.exit_code,
    )


def decode(value: bytes, kind: type[T]) -> T:
    """Return an item as ``kind``.

    Raises:
        RemoteProtocolError: the daemon is of another version.
    """
    try:
        return msgspec.msgpack.decode(value, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise errors.RemoteProtocolError(
            f"the daemon's answer is not a {kind.__name__}: {exc}",
            next_step="restart the daemon: it runs another version than this command",
        ) from exc
