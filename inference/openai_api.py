"""The OpenAI HTTP API as data: requests in, bodies out. No I/O.

Served: chat completions and completions, plain and streamed, and models. What a field
asks for and we do not do is refused by name, never ignored: a client that sends tools
must not get an answer that has not seen them.

Source: platform.openai.com/docs/api-reference (chat/completions, completions, models).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec

from fabric.core.errors import FabricError, RemoteRefused, ResourceExhausted
from inference.messages import MAX_PROMPT_TOKENS, Finish, Sampling, ServedModel
from inference.text import encode, render_chat

MAX_STOPS = 4
_DEFAULT_COMPLETION_TOKENS = 16
_SEED_LIMIT = 2**53

_Count = Annotated[int, msgspec.Meta(ge=1, le=MAX_PROMPT_TOKENS)]
_Stop = str | Annotated[list[str], msgspec.Meta(max_length=MAX_STOPS)] | None


class ApiError(FabricError):
    """A refusal in HTTP's terms.

    Args:
        status: HTTP status.
        reason: For people.
        kind: OpenAI's error type.
        param: Field at fault, or empty.
        code: OpenAI's code, or empty.
    """

    def __init__(
        self,
        status: int,
        reason: str,
        *,
        kind: str = "invalid_request_error",
        param: str = "",
        code: str = "",
    ) -> None:
        super().__init__(reason, code=code)
        self.status = status
        self.body = {
            "error": {
                "message": reason,
                "type": kind,
                "param": param or None,
                "code": code or None,
            }
        }


class _StreamOptions(msgspec.Struct):
    include_usage: bool = False


class _Common(msgspec.Struct, kw_only=True):
    model: str
    temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    max_tokens: _Count | None = None
    seed: int | None = None
    stop: _Stop = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    n: int | None = None


class _TextPart(msgspec.Struct):
    type: Literal["text"]
    text: str


class _Message(msgspec.Struct):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_TextPart]


class _Chat(_Common, kw_only=True):
    messages: Annotated[list[_Message], msgspec.Meta(min_length=1, max_length=10_000)]
    max_completion_tokens: _Count | None = None


class _Completion(_Common, kw_only=True):
    prompt: str


_NOT_SERVED = (
    "tools",
    "functions",
    "logprobs",
    "top_logprobs",
    "response_format",
    "logit_bias",
    "frequency_penalty",
    "presence_penalty",
    "best_of",
    "echo",
    "suffix",
    "audio",
)


class GenerationRequest(msgspec.Struct, frozen=True):
    """What to generate, and in which form to answer.

    Attributes:
        model: Name the client asked for.
        prompt: Tokens.
        chat: Chat completion, or completion.
        max_tokens: As asked; 0: as many as the context holds.
        temperature: 0 is greedy.
        top_p: Nucleus.
        seed: Of the draw; None: the gateway chooses.
        stop: Strings that end the reply.
        stream: Server-sent events.
        include_usage: A last event with token counts.
    """

    model: str
    prompt: tuple[int, ...]
    chat: bool
    max_tokens: int
    temperature: float
    top_p: float
    seed: int | None
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool


def parse_untrusted(body: bytes, *, chat: bool) -> GenerationRequest:
    """Return the request in ``body``.

    Raises:
        ApiError: 400 naming the field.
    """
    raw = _json_object(body)
    for name in _NOT_SERVED:
        if raw.get(name) and raw[name] != {"type": "text"}:
            raise ApiError(400, f"{name} is not supported", param=name)
    request: _Chat | _Completion = _convert(raw, _Chat if chat else _Completion)
    if request.n not in (None, 1):
        raise ApiError(400, "n must be 1", param="n")
    if isinstance(request, _Chat):
        text = render_chat((m.role, _plain(m.content)) for m in request.messages)
        limit = request.max_completion_tokens or request.max_tokens or 0
    else:
        text = request.prompt
        limit = request.max_tokens or _DEFAULT_COMPLETION_TOKENS
    if not text:
        raise ApiError(400, "the prompt is empty", param="prompt")
    stop = [request.stop] if isinstance(request.stop, str) else request.stop
    return GenerationRequest(
        model=request.model,
        prompt=encode(text),
        chat=chat,
        max_tokens=limit,
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=1.0 if request.top_p is None else request.top_p,
        seed=None if request.seed is None else request.seed % _SEED_LIMIT,
        stop=tuple(stop or ()),
        stream=bool(request.stream),
        include_usage=bool(
            request.stream_options and request.stream_options.include_usage
        ),
    )


def sampling_of(request: GenerationRequest, context: int, seed: int) -> Sampling:
    """Return how to sample for ``request``.

    Args:
        request: The request.
        context: Tokens that the model holds.
        seed: Used when the request has none.

    Raises:
        ApiError: 400: prompt and reply do not fit the context.
    """
    room = context - len(request.prompt)
    if room < max(request.max_tokens, 1):
        raise ApiError(
            400,
            f"the context holds {context} tokens; the prompt has "
            f"{len(request.prompt)} and {request.max_tokens} were asked for",
            param="messages" if request.chat else "prompt",
            code="context_length_exceeded",
        )
    return Sampling(
        max_tokens=request.max_tokens or room,
        temperature=request.temperature,
        top_p=request.top_p,
        seed=seed if request.seed is None else request.seed,
    )


def error_of(error: FabricError) -> ApiError:
    """Return any of our errors in HTTP's terms."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ResourceExhausted) or error.code == "E_BUSY":
        return ApiError(429, error.reason, kind="rate_limit_error", code="busy")
    if isinstance(error, RemoteRefused) and error.code == "E_CONTEXT":
        return ApiError(400, error.reason, code="context_length_exceeded")
    return ApiError(503, error.reason, kind="server_error", code=error.code)


class Replies:
    """Bodies of the answers to one request.

    Args:
        request: The request.
        reply_id: Unique.
        created: Unix seconds.
    """

    def __init__(self, request: GenerationRequest, reply_id: str, created: int) -> None:
        self._request = request
        prefix = "chatcmpl" if request.chat else "cmpl"
        self._base = {
            "id": f"{prefix}-{reply_id}",
            "created": created,
            "model": request.model,
        }

    def whole(self, text: str, finish: Finish, num_tokens: int) -> bytes:
        """Return the body of an answer that is not streamed."""
        if self._request.chat:
            kind = "chat.completion"
            message = {"role": "assistant", "content": text, "refusal": None}
            choice: dict[str, object] = {"message": message}
        else:
            kind, choice = "text_completion", {"text": text}
        choice |= {"index": 0, "finish_reason": finish, "logprobs": None}
        body = {"object": kind, "choices": [choice], "usage": self._usage(num_tokens)}
        return json.dumps({**self._base, **body}).encode()

    def piece(self, text: str, finish: Finish = "", *, first: bool = False) -> bytes:
        """Return one event of a stream."""
        reason = finish or None
        if self._request.chat:
            delta: dict[str, str] = {"role": "assistant"} if first else {}
            if text or first:
                delta["content"] = text
            choice: dict[str, object] = {"delta": delta}
        else:
            choice = {"text": text}
        choice |= {"index": 0, "finish_reason": reason, "logprobs": None}
        return self._event([choice], None)

    def usage(self, num_tokens: int) -> bytes:
        """Return the event with the token counts."""
        return self._event([], self._usage(num_tokens))

    def _event(
        self, choices: list[dict[str, object]], usage: Mapping[str, int] | None
    ) -> bytes:
        kind = "chat.completion.chunk" if self._request.chat else "text_completion"
        body: dict[str, object] = {**self._base, "object": kind, "choices": choices}
        if self._request.include_usage:
            body["usage"] = usage
        return event(body)

    def _usage(self, num_tokens: int) -> dict[str, int]:
        prompt = len(self._request.prompt)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": num_tokens,
            "total_tokens": prompt + num_tokens,
        }


DONE = b"data: [DONE]\n\n"


def event(body: Mapping[str, object]) -> bytes:
    """Return a server-sent event."""
    return b"data: " + json.dumps(body).encode() + b"\n\n"


def model_list(models: Mapping[str, ServedModel]) -> dict[str, object]:
    """Return the body of ``/v1/models``."""
    return {"object": "list", "data": [model_entry(name) for name in sorted(models)]}


def model_entry(name: str) -> dict[str, object]:
    """Return one model of the list."""
    return {"id": name, "object": "model", "created": 0, "owned_by": "fabric"}


def _json_object(body: bytes) -> dict[str, Any]:
    try:
        raw = json.loads(body)
        # JSON can name half a surrogate pair, which no UTF-8 can: neither a prompt nor
        # our own answer about it could be encoded.
        json.dumps(raw, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as exc:
        raise ApiError(400, f"the body is not JSON: {exc}") from exc
    if not isinstance(raw, dict):
        raise ApiError(400, "the body is not a JSON object")
    return raw


def _convert(raw: dict[str, Any], kind: type[_Chat | _Completion]) -> Any:  # noqa: ANN401
    try:
        return msgspec.convert(raw, kind)
    except (msgspec.ValidationError, RecursionError) as exc:
        # "Expected `str`, got `int` - at `$.model`"
        message = str(exc)
        path = message.rpartition("`$.")[2].rstrip("`") if "`$." in message else ""
        if "missing required field `" in message:
            path = message.partition("field `")[2].partition("`")[0]
        raise ApiError(400, message, param=path) from exc


def _plain(content: str | list[_TextPart]) -> str:
    if isinstance(content, str):
        return content
    return "".join(part.text for part in content)
