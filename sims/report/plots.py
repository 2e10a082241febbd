"""Plots of one run: agreement, traffic per peer, staleness of views."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fabric.core.errors import ConfigError
from sims.report.report import Sample

_SIZE_INCHES = (8.0, 3.2)
_DOTS_PER_INCH = 110


def write_plots(folder: Path, samples: Sequence[Sample], title: str) -> list[Path]:
    """Write one PNG per question; return their paths.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
    except ImportError as exc:
        raise ConfigError(
            "plots need matplotlib",
            next_step="pip install 'peerfabric[dev]', or leave out --out",
        ) from exc
    mpl.use("Agg")
    seconds = [sample.seconds for sample in samples]
    curves = {
        "convergence": (
            "peers that agree (fraction)",
            [sample.agreeing for sample in samples],
        ),
        "traffic": (
            "sent per peer (B/s)",
            [sample.bytes_per_peer_second for sample in samples],
        ),
        "staleness": (
            "oldest write not everywhere (s)",
            [sample.staleness_seconds for sample in samples],
        ),
    }
    folder.mkdir(parents=True, exist_ok=True)
    return [
        _plot(folder / f"{name}.png", seconds, values, label, title)
        for name, (label, values) in curves.items()
    ]


def _plot(
    file: Path,
    seconds: Sequence[float],
    values: Sequence[float],
    label: str,
    title: str,
) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE_INCHES, dpi=_DOTS_PER_INCH, layout="constrained")
    axes = figure.subplots()
    axes.plot(seconds, values, linewidth=1.2)
    axes.set(xlabel="virtual seconds", ylabel=label, title=title)
    axes.set_ylim(bottom=0)
    axes.grid(visible=True, alpha=0.3)
    figure.savefig(file)
    return file
