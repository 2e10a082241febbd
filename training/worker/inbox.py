"""What reaches the worker's main thread, from all the others."""

from __future__ import annotations

import queue
from dataclasses import dataclass

from training.messages import Command
from training.worker.exchange import Lost, Opened, Received

INBOX_ITEMS = 64
"""At most this many received payloads wait for the main thread."""


@dataclass(frozen=True)
class Commanded:
    """A command from the daemon, with its descriptors."""

    command: Command
    fds: tuple[int, ...]


@dataclass(frozen=True)
class DaemonGone:
    """The link ended: nobody is left to work for."""


InboxItem = Commanded | DaemonGone | Opened | Received | Lost
Inbox = queue.Queue[InboxItem]
