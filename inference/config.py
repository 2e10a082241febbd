"""What an operator may set about serving."""

from __future__ import annotations

from typing import Annotated

import msgspec


class InferenceConfig(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True
):
    """Limits of a stage, and the gateway's door."""

    max_sequences: Annotated[int, msgspec.Meta(ge=1, le=256)] = 16
    """Sequences decoded at once per stage; each holds KV memory of one context."""
    max_waiting: Annotated[int, msgspec.Meta(ge=0, le=4096)] = 64
    """Sessions that wait for a place before the first stage says busy."""
    prefill_tokens: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 128
    """Prompt tokens per step: bounds how long a prompt delays the others' tokens."""
    worker_memory_bytes: Annotated[int, msgspec.Meta(ge=1 << 28)] = 8 << 30
    worker_threads: Annotated[int, msgspec.Meta(ge=1, le=256)] = 1
    gateway_host: str = "127.0.0.1"
    gateway_port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 0
    """0 lets the system choose."""
    gateway_token: str = ""
    """Bearer token that clients must send; empty: none, for loopback only."""
    max_requests: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 128
    """HTTP generations in progress; more are answered with 429."""
    max_body_bytes: Annotated[int, msgspec.Meta(ge=1024)] = 1 << 20
    token_timeout_seconds: Annotated[float, msgspec.Meta(gt=0)] = 30.0
    """Longest silence between two tokens before a generation is given up."""
