"""A link with delay and loss between two TAP devices of two namespaces.

Run as a process of its own: ``python -m sims.lab.delay_link '{"ends": ...}'``. It says
"ready" once both devices are attached and ends when its standard input does. Needed
because not every kernel has netem. Frames carry their offload header, so that one read
moves up to 64 KiB of a TCP stream; with loss, offloads are off and frames are single.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import select
import struct
import sys
import time
from collections import deque

from sims.lab.enter import enter_namespace

TUNSETIFF = 0x400454CA
TUNSETOFFLOAD = 0x400454D0
TUNSETVNETHDRSZ = 0x400454D8
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6 = 0x01, 0x02, 0x04
VNET_HEADER_BYTES = 10
FRAME_BYTES = (1 << 16) + 64
"""The largest frame with its offload header."""
FRAMES_PER_TURN = 64
"""Read from one end before the other has its turn."""


class DelayQueue:
    """Frames of one direction: first in, first out, each ``delay`` after it came.

    Args:
        delay: Seconds.
        max_bytes: Held at once; more is dropped.
        loss: Share that vanishes.
        rng: Decides which.
    """

    def __init__(
        self, delay: float, max_bytes: int, loss: float, rng: random.Random
    ) -> None:
        self._delay = delay
        self._max = max_bytes
        self._loss = loss
        self._rng = rng
        self._frames: deque[tuple[float, bytes]] = deque()
        self.held_bytes = 0
        self.dropped = 0

    def push(self, now: float, frame: bytes) -> None:
        """Hold ``frame``, or drop it."""
        lost = self._loss > 0 and self._rng.random() < self._loss
        if lost or self.held_bytes + len(frame) > self._max:
            self.dropped += 1
            return
        self._frames.append((now + self._delay, frame))
        self.held_bytes += len(frame)

    def next_due(self) -> float | None:
        """Return when the oldest frame is due."""
        return self._frames[0][0] if self._frames else None

    def pop(self, now: float) -> bytes | None:
        """Return the oldest frame if it is due."""
        if not self._frames or self._frames[0][0] > now:
            return None
        frame = self._frames.popleft()[1]
        self.held_bytes -= len(frame)
        return frame


def attach(namespace: str, device: str, *, offload: bool) -> int:
    """Return a non-blocking descriptor of the TAP ``device`` in ``namespace``.

    The calling thread is in that namespace afterwards.
    """
    enter_namespace(namespace)
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR
    request = struct.pack("16sH22x", device.encode(), flags)
    fcntl.ioctl(tap, TUNSETIFF, request)
    fcntl.ioctl(tap, TUNSETVNETHDRSZ, struct.pack("i", VNET_HEADER_BYTES))
    offloads = TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 if offload else 0
    fcntl.ioctl(tap, TUNSETOFFLOAD, offloads)
    return tap


def carry(ends: tuple[int, int], queues: tuple[DelayQueue, DelayQueue]) -> None:
    """Move frames between ``ends`` until standard input ends."""
    while True:
        now = time.monotonic()
        dues = [due for queue in queues if (due := queue.next_due()) is not None]
        wait = max(0.0, min(dues) - now) if dues else None
        readable, _, _ = select.select([*ends, 0], [], [], wait)
        if 0 in readable:
            return
        for source, queue in zip(ends, queues, strict=True):
            if source in readable:
                _take(source, queue)
        now = time.monotonic()
        for target, queue in zip(reversed(ends), queues, strict=True):
            while (frame := queue.pop(now)) is not None:
                _give(target, frame, queue)


def _take(source: int, queue: DelayQueue) -> None:
    for _ in range(FRAMES_PER_TURN):
        try:
            frame = os.read(source, FRAME_BYTES)
        except OSError:  # empty, or the device is down for now
            return
        queue.push(time.monotonic(), frame)


def _give(target: int, frame: bytes, queue: DelayQueue) -> None:
    try:
        os.write(target, frame)
    except OSError:  # the device is down, or refuses a frame: so does a cable
        queue.dropped += 1


def main() -> None:
    """Attach both ends, say so, and carry frames."""
    options = json.loads(sys.argv[1])
    offload = not options["loss"]
    (one, device), (other, other_device) = options["ends"]
    ends = (
        attach(one, device, offload=offload),
        attach(other, other_device, offload=offload),
    )
    rngs = [random.Random(f"{options['seed']} {way}") for way in ("up", "down")]
    shape = (options["delay"], options["queue_bytes"], options["loss"])
    print("ready", flush=True)
    carry(ends, (DelayQueue(*shape, rngs[0]), DelayQueue(*shape, rngs[1])))


if __name__ == "__main__":
    main()
