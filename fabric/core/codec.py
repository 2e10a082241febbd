"""Encode and decode wire messages. The only module that calls msgspec on peer bytes."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import msgspec

from fabric.core.errors import RemoteProtocolError

M = TypeVar("M")

# Everything msgspec raises on hostile input. UnicodeDecodeError (bad UTF-8 in a str
# field) and RecursionError (deeply nested unknown field) are *not* MsgspecError.
_DECODE_ERRORS = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


class Codec(Generic[M]):
    """MessagePack codec for one Struct or one tagged union of Structs.

    Args:
        union: The ``msgspec.Struct`` type, or union of them, that may appear on this
            protocol (a type form, which Python 3.11 cannot annotate).
        max_bytes: Largest encoded message accepted, in bytes.
    """

    def __init__(self, union: Any, *, max_bytes: int) -> None:  # noqa: ANN401
        self._decoder: msgspec.msgpack.Decoder[M] = msgspec.msgpack.Decoder(union)
        self._encoder = msgspec.msgpack.Encoder(order="deterministic")
        self.max_bytes = max_bytes

    def encode(self, message: M) -> bytes:
        """Return the encoded ``message``. Same message, same bytes."""
        return self._encoder.encode(message)

    def decode_untrusted(self, data: bytes | bytearray | memoryview) -> M:
        """Decode bytes that came from a peer or a file.

        Raises:
            RemoteProtocolError: ``data`` is oversized, malformed, or not in the union.
                No other exception leaves this function, whatever the bytes.
        """
        if len(data) > self.max_bytes:
            raise RemoteProtocolError(f"message of {len(data)} B > {self.max_bytes} B")
        try:
            return self._decoder.decode(data)
        except _DECODE_ERRORS as exc:
            raise RemoteProtocolError(str(exc)) from exc
