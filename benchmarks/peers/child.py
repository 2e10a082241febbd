"""A contestant's process: JSON commands on standard input, answers on standard output.

Standard library only: a rival's environment does not have ours.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable
from typing import Any

Message = dict[str, Any]


def usage() -> Message:
    """Return this process's CPU seconds and peak resident bytes."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    unit = 1 if sys.platform == "darwin" else 1024
    return {"cpu": used.ru_utime + used.ru_stime, "rss": used.ru_maxrss * unit}


def read() -> Message | None:
    """Return the next command, or None when the parent is done."""
    line = sys.stdin.readline()
    return json.loads(line) if line else None


def write(message: Message) -> None:
    """Answer the parent."""
    print(json.dumps(message), flush=True)


def answer_commands(run: Callable[[Message], Message]) -> None:
    """Answer commands until the parent is done; "usage" is answered here."""
    while (command := read()) is not None:
        write(usage() if command.get("do") == "usage" else run(command))
