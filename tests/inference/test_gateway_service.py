import json
import os
import signal
from functools import partial

import httpx
import openai
import pytest
import trio

from inference.config import InferenceConfig
from tests.inference.mesh import Mesh, until

TOKEN = "secret"
pytestmark = pytest.mark.slow


@pytest.fixture
async def mesh(model, tmp_path):
    """Two stages, and a gateway on a third daemon that takes no part."""
    config = InferenceConfig(max_sequences=4, max_waiting=2, gateway_token=TOKEN)
    async with Mesh(model, tmp_path, 2, config) as mesh:
        mesh.stage_daemons = [mesh.add(), mesh.add()]
        for daemon in mesh.stage_daemons:
            await mesh.join(daemon)
        await mesh.generation(1, mesh.stage_daemons)
        mesh.url = await mesh.gateway(mesh.add())
        mesh.reference = json.loads((model / "reference.json").read_text())
        yield mesh


def in_thread(function):
    return trio.to_thread.run_sync(function, abandon_on_cancel=True)


def client(mesh, key=TOKEN):
    return openai.OpenAI(base_url=mesh.url + "/v1", api_key=key, max_retries=0)


def text_of(tokens):
    return bytes(tokens).decode(errors="replace")


def first_stage(mesh):
    return mesh.runners[min(mesh.runners)]


async def test_the_stock_client_gets_the_tokens_of_transformers(mesh):
    def complete(prompt):
        with client(mesh) as c:
            return c.completions.create(
                model="tiny", prompt=prompt, max_tokens=16, temperature=0
            )

    answers = {}

    async def ask(prompt):
        answers[prompt] = await in_thread(partial(complete, prompt))

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:  # batched together
            for prompt in mesh.reference:
                nursery.start_soon(ask, prompt)
    for prompt, tokens in mesh.reference.items():
        answer = answers[prompt]
        assert answer.choices[0].text == text_of(tokens)
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage.completion_tokens == 16
        assert answer.usage.prompt_tokens == len(prompt)
    # the stages hold what they must: nothing but the ends sees tokens
    assert {method for method, _, _ in mesh.calls} >= {"serve.submit", "serve.tokens"}
    with trio.fail_after(60):
        await until(lambda: not first_stage(mesh)._live)


async def test_streaming_chat_usage_and_errors(mesh):
    def talk():
        with client(mesh) as c:
            assert [m.id for m in c.models.list()] == ["tiny"]
            chunks = list(
                c.chat.completions.create(
                    model="tiny",
                    messages=[{"role": "user", "content": "hello"}],
                    max_tokens=8,
                    temperature=0.7,
                    seed=5,
                    stream=True,
                    stream_options={"include_usage": True},
                )
            )
            whole = c.chat.completions.create(
                model="tiny",
                messages=[{"role": "user", "content": "hello"}],
                max_tokens=8,
                temperature=0.7,
                seed=5,
            )
            streamed = "".join(
                x.choices[0].delta.content or "" for x in chunks if x.choices
            )
            assert streamed == whole.choices[0].message.content
            assert chunks[-2].choices[0].finish_reason == "length"
            assert chunks[-1].usage.completion_tokens == 8
            with pytest.raises(openai.NotFoundError):
                c.completions.create(model="other", prompt="x")
            with pytest.raises(openai.BadRequestError, match="context"):
                c.completions.create(model="tiny", prompt="x" * 200, max_tokens=1)
            with pytest.raises(openai.BadRequestError, match="tools"):
                c.chat.completions.create(
                    model="tiny",
                    messages=[{"role": "user", "content": "x"}],
                    tools=[{"type": "function", "function": {"name": "f"}}],
                )
            with pytest.raises(openai.NotFoundError):
                c.embeddings.create(model="tiny", input="x")
        with client(mesh, "wrong") as c, pytest.raises(openai.AuthenticationError):
            c.models.list()

    with trio.fail_after(60):
        await in_thread(talk)


async def post(mesh, body):
    """Return a raw connection that has sent a request."""
    port = int(mesh.url.rpartition(":")[2])
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    data = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    await stream.send_all(head.encode() + data)
    return stream


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_goes_away_frees_its_session(mesh, stream):
    runner = first_stage(mesh)
    body = {"model": "tiny", "prompt": "x", "max_tokens": 120, "temperature": 0}
    with trio.fail_after(60):
        async with await post(mesh, {**body, "stream": stream}) as connection:
            if stream:
                assert b"200" in await connection.receive_some()
            await until(lambda: runner._live)
        await until(lambda: not runner._live)
    assert "serve.cancel" in {method for method, _, _ in mesh.calls}


async def test_too_many_sessions_are_told_to_come_back(mesh):
    body = {
        "model": "tiny", "prompt": "x", "max_tokens": 120, "temperature": 0,
    }  # fmt: skip
    headers = {"authorization": f"Bearer {TOKEN}"}
    statuses = []

    async with httpx.AsyncClient(base_url=mesh.url, headers=headers, timeout=60) as c:

        async def ask():
            answer = await c.post("/v1/completions", json=body)
            statuses.append(answer.status_code)
            if answer.status_code == 429:
                assert answer.headers["retry-after"]
                assert answer.json()["error"]["type"] == "rate_limit_error"

        worker = first_stage(mesh)._link.pid
        os.kill(worker, signal.SIGSTOP)  # nobody is done before all have asked
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                for _ in range(8):
                    nursery.start_soon(ask)
                await until(lambda: len(statuses) == 2)
                os.kill(worker, signal.SIGCONT)
    assert sorted(statuses) == [200] * 6 + [429] * 2


async def test_a_session_survives_the_loss_of_the_last_stage(mesh):
    """Same tokens as an undisturbed run, across a kill in the middle."""
    body = {"model": "tiny", "prompt": "ab", "max_tokens": 120, "temperature": 0}
    first, lost = sorted(mesh.stage_daemons, key=lambda daemon: daemon.peer_id)
    spare = mesh.add()
    while spare.peer_id < first.peer_id:  # sessions live as long as the head does
        spare = mesh.add()
    await mesh.join(spare)
    answers = []

    def tokens_from(daemon):
        sent = ("serve.tokens", daemon.peer_id)
        return [call for call in mesh.calls if call[:2] == sent]

    def complete():
        with client(mesh) as c:
            answers.append(c.completions.create(**body).choices[0].text)

    with trio.fail_after(90):
        await in_thread(complete)
        before = len(tokens_from(lost))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(in_thread, complete)
            await until(lambda: len(tokens_from(lost)) > before)
            mesh.leave(lost)
            await mesh.generation(2, [first, spare])
        assert tokens_from(spare)
    assert answers[0] == answers[1]
