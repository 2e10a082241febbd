"""What a demo found, as one JSON object, as a table, and as a plot."""

from __future__ import annotations

from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table


class LossPoint(msgspec.Struct, frozen=True):
    """Validation loss (nats per byte) after ``tokens`` tokens."""

    tokens: int
    loss: float


class Summary(msgspec.Struct, kw_only=True):
    """The facts of one run; losses in nats per byte, sizes in bytes."""

    seed: int = 0
    seconds: float = 0.0
    peers: int = 0
    refused: str = ""
    killed: str = ""
    joined: str = ""
    paths: dict[str, str] = {}
    generations: int = 0
    coordinator_changes: int = 0
    rounds: int = 0
    tokens: int = 0
    tokens_per_second: float = 0.0
    entropy: float = 0.0
    loss_start: float = 0.0
    loss_end: float = 0.0
    loss_single: float = 0.0
    curve: list[LossPoint] = []
    single_curve: list[LossPoint] = []
    digests_equal: bool = False
    bytes_by_link: dict[str, int] = {}
    bytes_expected: int = 0
    bytes_ratio: float = 0.0
    state_sources: int = 0
    checkpoint: str = ""
    content_root: str = ""
    verified: bool = False
    logits_equal: bool = False
    tokens_equal: bool = False
    completion: str = ""
    files: str = ""
    failures: list[str] = []


def judge(summary: Summary) -> list[str]:
    """Return what a run missed; empty when it met every aim."""
    checks = {
        "no peer was refused": bool(summary.refused),
        "validation loss above 3.0": summary.loss_end <= 3.0,
        "validation loss more than 0.35 above a single process": (
            summary.loss_end - summary.loss_single <= 0.35
        ),
        "peers end with different parameters": summary.digests_equal,
        "bytes differ from the closed form by more than 5 %": (
            abs(summary.bytes_ratio - 1) <= 0.05
        ),
        "the newcomer got its state from one peer alone": summary.state_sources > 1,
        "the checkpoint does not verify": summary.verified,
        "logits differ": summary.logits_equal,
        "served tokens differ": summary.tokens_equal,
    }
    return [name for name, holds in checks.items() if not holds]


def print_summary(summary: Summary) -> None:
    """Print the table for a person, on stderr."""
    table = Table(show_header=False, box=None)
    rows = {
        "time": f"{summary.seconds:.0f} s",
        "peers": f"{summary.peers} (killed {summary.killed}, joined {summary.joined})",
        "refused": summary.refused,
        "loss": (
            f"{summary.loss_start:.3f} -> {summary.loss_end:.3f} nats/byte "
            f"(single process {summary.loss_single:.3f}, "
            f"byte-unigram entropy {summary.entropy:.3f})"
        ),
        "tokens": f"{summary.tokens} at {summary.tokens_per_second:.0f}/s",
        "links": (
            f"{sum(summary.bytes_by_link.values())} B on "
            f"{len(summary.bytes_by_link)} links, "
            f"{summary.bytes_ratio:.3f} of the closed form"
        ),
        "newcomer": f"state from {summary.state_sources} peers",
        "parameters": "equal on all peers" if summary.digests_equal else "DIFFER",
        "checkpoint": f"{summary.checkpoint} verified: {summary.verified}",
        "logits": "identical" if summary.logits_equal else "DIFFER",
        "serving": "greedy tokens equal" if summary.tokens_equal else "DIFFER",
        "files": summary.files,
    }
    for name, value in rows.items():
        table.add_row(name, str(value))
    for link, size in sorted(summary.bytes_by_link.items()):
        table.add_row("", f"{link}  {size} B")
    Console(stderr=True).print(table)


def plot(summary: Summary, path: Path) -> None:
    """Save the loss curves as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for points, label in (
        (summary.curve, f"{summary.peers} peers, DiLoCo int8"),
        (summary.single_curve, "single process"),
    ):
        axes.plot([p.tokens for p in points], [p.loss for p in points], label=label)
    axes.axhline(summary.entropy, color="gray", ls=":", label="byte-unigram entropy")
    axes.set_xlabel("tokens")
    axes.set_ylabel("validation loss, nats/byte")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
