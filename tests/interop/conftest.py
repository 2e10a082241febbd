"""A js-libp2p node in a process of its own, driven by lines of JSON."""

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio

SOURCE = Path(__file__).parent / "js"
INSTALLED = Path(__file__).parents[2] / "build" / "interop"
"""Ignored by git; a folder per lock file, so that a change installs anew."""
INSTALL_SECONDS = 300
MIN_NODE = 20
"""What js-libp2p needs."""
STEP_SECONDS = 15


class JsError(Exception):
    """What js-libp2p raised: its name and message."""


class JsNode:
    """A running node; made by :func:`open_js`."""

    def __init__(self, process):
        self._process = process
        self._buffer = b""
        self.peer = ""
        self.addrs = []

    async def call(self, verb, **arguments):
        """Return the answer to ``verb``, or raise JsError."""
        line = json.dumps({"verb": verb, **arguments}) + "\n"
        with trio.fail_after(STEP_SECONDS):
            await self._process.stdin.send_all(line.encode())
            return await self.answer()

    async def answer(self):
        while b"\n" not in self._buffer:
            data = await self._process.stdout.receive_some()
            assert data, "the js node ended"
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer = json.loads(line)
        if "error" in answer:
            raise JsError(f"{answer['error']}: {answer['message']}\n{answer['stack']}")
        return answer


def node_major():
    """Return the major version of node."""
    done = subprocess.run(
        ["node", "--version"], capture_output=True, text=True, timeout=60, check=True
    )
    return int(done.stdout.strip().removeprefix("v").partition(".")[0])


@pytest.fixture(scope="session")
def js_folder():
    """A folder with the locked packages and the node's program."""
    if not (shutil.which("node") and shutil.which("npm")):
        pytest.skip("install nodejs and npm")
    if (major := node_major()) < MIN_NODE:
        pytest.skip(f"node {major} < {MIN_NODE}: npm install --global node@{MIN_NODE}")
    lock = (SOURCE / "package-lock.json").read_bytes()
    folder = INSTALLED / hashlib.sha256(lock).hexdigest()[:16]
    if not folder.exists():
        install(folder)
    for program in SOURCE.glob("*.mjs"):
        shutil.copy(program, folder)
    return folder


def install(folder):
    """Install into a temporary folder; only a complete one gets the name."""
    INSTALLED.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=INSTALLED) as temporary:
        for name in ("package.json", "package-lock.json"):
            shutil.copy(SOURCE / name, temporary)
        done = subprocess.run(
            ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"],
            cwd=temporary,
            capture_output=True,
            text=True,
            timeout=INSTALL_SECONDS,
            check=False,
        )
        if done.returncode:
            pytest.fail(f"npm ci: {done.stderr[-2000:]}", pytrace=False)
        if not folder.exists():  # another run may have been faster
            os.rename(temporary, folder)
            Path(temporary).mkdir()  # for the cleanup to find


@asynccontextmanager
async def open_js(folder, **options):
    """Run a node; its peer id and addresses are known inside the block."""
    process = await trio.lowlevel.open_process(
        ["node", "node.mjs", json.dumps(options)],
        cwd=folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    node = JsNode(process)
    try:
        with trio.fail_after(STEP_SECONDS):
            started = await node.answer()
        node.peer, node.addrs = started["peer"], started["addrs"]
        yield node
    finally:
        process.kill()
        with trio.CancelScope(shield=True), trio.move_on_after(5):
            await process.wait()
            await process.stdin.aclose()
            await process.stdout.aclose()


@pytest.fixture
def js(js_folder):
    """Start nodes: ``async with js(security=["tls"]) as node``."""
    return partial(open_js, js_folder)
