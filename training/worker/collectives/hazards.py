"""Which operations of a program wait for which: only where spans overlap.

A later operation waits for an earlier one when they share elements and one of them
writes. It waits for as much as it needs: operations advance in order of address, so
the first piece of a part is sent on while its rest is still arriving.
"""

from __future__ import annotations

from dataclasses import dataclass

from training.worker.collectives.schedule import Program, Span


@dataclass(frozen=True, slots=True)
class Wait:
    """Operation ``on`` must have done its elements up to an address."""

    on: int
    span: Span
    """The other operation's own span."""

    def needed(self, stop: int) -> int:
        """Return how many of its elements must be done before we touch ``stop``."""
        return min(stop, self.span.stop) - self.span.start


Waits = tuple[tuple[Wait, ...], ...]


def waits_of(program: Program) -> Waits:
    """Return, for each operation, the earlier ones that it waits for."""
    found: list[tuple[Wait, ...]] = []
    for number, op in enumerate(program):
        found.append(
            tuple(
                Wait(other, program[other].span)
                for other in range(number)
                if (op.writes or program[other].writes)
                and _overlap(op.span, program[other].span)
            )
        )
    return tuple(found)


def _overlap(a: Span, b: Span) -> bool:
    return a.start < b.stop and b.start < a.stop
