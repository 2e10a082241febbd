"""Runs contestants: a serving and a dialling process each, on loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.contract import Sample
from fabric.bulk.certificates import Credentials, issue_identity_certificate
from fabric.core.signing import Ed25519Signer

ROOT = Path(__file__).parent.parent
ANSWER_SECONDS = 120.0
"""A contestant that says nothing for this long is killed."""
Message = dict[str, Any]


class Process:
    """One child that answers JSON commands.

    Args:
        python: Interpreter of the environment that has the contestant.
        module: Of ``benchmarks.peers``.
        arguments: Its arguments.
        enter: Put before the command: what moves it into another network.
        fds: Descriptors that it inherits.
    """

    def __init__(
        self,
        python: str,
        module: str,
        *arguments: str,
        enter: Sequence[str] = (),
        fds: Sequence[int] = (),
    ) -> None:
        self._child = subprocess.Popen(
            [*enter, python, "-m", f"benchmarks.peers.{module}", *arguments],
            cwd=ROOT,
            pass_fds=fds,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, message: Message) -> Message:
        """Return the child's answer to ``message``."""
        self.tell(message)
        return self.listen()

    def tell(self, message: Message) -> None:
        """Send ``message``; :meth:`listen` gets the answer."""
        assert self._child.stdin is not None
        self._child.stdin.write(json.dumps(message) + "\n")
        self._child.stdin.flush()

    def listen(self) -> Message:
        """Return the child's next line.

        Raises:
            RuntimeError: the child ended, or was killed because it was silent.
        """
        assert self._child.stdout is not None
        watchdog = threading.Timer(ANSWER_SECONDS, self._child.kill)
        watchdog.start()
        try:
            while line := self._child.stdout.readline():
                if line.startswith("{"):  # a rival may print banners
                    answer: Message = json.loads(line)
                    return answer
        finally:
            watchdog.cancel()
        raise RuntimeError(f"contestant ended with status {self._child.wait()}")

    def close(self) -> None:
        """End the child."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.close()
        try:
            self._child.wait(5)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._child.stdout.close()


class Contestant:
    """A server and a client that measure cases."""

    def __init__(self, server: Process, client: Process) -> None:
        self._server = server
        self._client = client

    def run(self, case: Message, others: Sequence[Process] = ()) -> Sample:
        """Return the client's measurement of ``case`` and what it cost all sides.

        The client answers {"value": rate, "work": calls or GB}.

        Args:
            case: What to measure.
            others: Processes that take part, such as relays.
        """
        processes = (self._client, self._server, *others)
        before = [p.ask({"do": "usage"}) for p in processes]
        answer = self._client.ask({"do": "run", **case})
        after = [p.ask({"do": "usage"}) for p in processes]
        cpu = sum(a["cpu"] - b["cpu"] for a, b in zip(after, before, strict=True))
        return Sample(
            value=answer["value"],
            cpu_seconds=cpu / answer["work"],
            peak_rss_bytes=max(a["rss"] for a in after),
        )


@contextmanager
def contestant(
    module: str,
    *,
    python: str = sys.executable,
    secrets: tuple[Message, Message] | None,
) -> Iterator[Contestant]:
    """Run ``benchmarks.peers.module`` as a pair; leaving ends both processes.

    Args:
        module: Started with "serve" and "dial"; the server's first line is the
            address, which the client gets as its first line.
        python: Interpreter of the environment that has the contestant.
        secrets: First line for the server and part of the client's: credentials.
    """
    with ExitStack() as stack:
        server = Process(python, module, "serve")
        stack.callback(server.close)
        ours, theirs = secrets or ({}, {})
        address = server.ask(ours)
        client = Process(python, module, "dial")
        stack.callback(client.close)
        client.ask({**theirs, **address})
        yield Contestant(server, client)


def secrets() -> tuple[Message, Message]:
    """Return fresh identity credentials for the server and the client."""
    server, client = (
        issue_identity_certificate(Ed25519Signer.generate(), time.time())
        for _ in range(2)
    )
    return _as_message(server, client.der), _as_message(client, server.der)


def _as_message(mine: Credentials, peer_der: bytes) -> Message:
    """Return credentials as JSON for one side."""
    return {
        "der": mine.der.hex(),
        "certificate": mine.certificate_pem.decode(),
        "key": mine.key_pem.decode(),
        "peer": peer_der.hex(),
    }


def find_lattica() -> tuple[str | None, str]:
    """Return (python that has lattica, or None; why there is none)."""
    python = os.environ.get("FABRIC_BENCH_LATTICA_PYTHON", sys.executable)
    probe = subprocess.run(
        [python, "-c", "import lattica"], capture_output=True, text=True, check=False
    )
    if probe.returncode == 0:
        return python, ""
    return None, (
        "lattica is not installed: run `make bench-setup`, or name a python that has "
        "it in FABRIC_BENCH_LATTICA_PYTHON"
    )
