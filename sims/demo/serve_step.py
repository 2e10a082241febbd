"""Step 5: serve on two peers; stream a completion through the openai client."""

from __future__ import annotations

from fabric.core.errors import ConfigError
from sims.demo.checkpoint_step import NUM_TOKENS, PROMPT
from sims.demo.view import DemoView
from sims.local import LocalMesh

STAGES = 2
REQUEST_SECONDS = 60.0


def serve_and_ask(mesh: LocalMesh, view: DemoView, peer: str, content_root: str) -> str:
    """Return the streamed greedy completion of PROMPT.

    Raises:
        ConfigError: the ``openai`` package is missing.
        FabricError: the model could not be served.
    """
    try:
        from openai import OpenAI
    except ImportError as exc:
        raise ConfigError(
            "the demo streams through the openai client, which is not installed",
            next_step="pip install 'peerfabric[dev]'",
        ) from exc
    url = mesh.client(peer).serve(content_root, stages=STAGES, model_name="demo")
    view.say(f"{STAGES} stages behind {url}")
    client = OpenAI(
        base_url=url, api_key="none", timeout=REQUEST_SECONDS, max_retries=0
    )
    stream = client.completions.create(
        model="demo", prompt=PROMPT, max_tokens=NUM_TOKENS, temperature=0, stream=True
    )
    text = ""
    for chunk in stream:
        text += chunk.choices[0].text if chunk.choices else ""
    view.say(f"streamed {len(text)} characters: {text[:60]!r}")
    return text
