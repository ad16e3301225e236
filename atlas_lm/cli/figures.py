"""Drawings to files, without a display and without the state of pyplot."""

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from atlas_lm.files import write_atomically


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of this size in inches that lays itself out."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a PNG so that no reader, and no crash, meets half of it. OSError: it cannot be written."""
    write_atomically(path, lambda file: figure.savefig(file, dpi=120, format="png"))
