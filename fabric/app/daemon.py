"""``fabric up``: one daemon per data folder, until Ctrl+C, SIGTERM or `fabric down`."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Mapping
from pathlib import Path

import trio

from crdt_store.storage import lock_data_folder
from fabric.app.config import NodeConfig, load_node_config
from fabric.app.home import Home
from fabric.app.identity import load_or_create_identity
from fabric.app.node import Node
from fabric.core.ids import short
from fabric.core.signing import Ed25519Signer
from fabric.net.tasks import collapse_group

log = logging.getLogger(__name__)

INTERRUPTED = 130
"""Exit status after Ctrl+C, as a shell gives it."""


def run_daemon(home_path: Path | None, flags: Mapping[str, object]) -> int:
    """Run the daemon until it is told to end; return the exit status.

    Args:
        home_path: Directory of this peer instead of the XDG directories.
        flags: Dotted configuration keys and values from the command line.

    Raises:
        ConfigError: the configuration, the data folder or a port is not usable, or
            another daemon runs on the same data folder.
    """
    home = Home.find(home_path)
    home.create()
    config = load_node_config(home, flags)
    logging.basicConfig(
        level=config.log_level,
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
    )
    for noisy in ("libp2p", "async_service", "hypercorn"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    with lock_data_folder(home.data):
        signer = load_or_create_identity(home.identity_file)
        status = trio.run(_run, home, config, signer)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # there is nothing left to end
    return status


async def _run(home: Home, config: NodeConfig, signer: Ed25519Signer) -> int:
    told: list[int] = []
    node = Node(home, config, signer)
    with (
        collapse_group(),
        trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as received,
    ):

        async def listen() -> None:
            async for number in received:
                if told:
                    os._exit(INTERRUPTED)  # the second time, at once
                told.append(number)
                log.info("daemon.ending signal=%d (again: at once)", number)
                node.ended.set()

        # a nursery around the services: the second signal is heard while they close
        async with trio.open_nursery() as listening:
            listening.start_soon(listen)
            async with trio.open_nursery() as nursery:
                await nursery.start(node.run)
                log.info("daemon.up peer=%s home=%s", short(signer.peer_id), home.data)
                await node.ended.wait()
                if told:
                    await node.leave_jobs()
                nursery.cancel_scope.cancel()
            listening.cancel_scope.cancel()
    log.info("daemon.down")
    return INTERRUPTED if signal.SIGINT in told else 0
