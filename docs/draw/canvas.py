"""What all pictures share: colours, a canvas, and how a picture is written.

A picture is two functions: `data()` computes plain numbers with the library, `draw(data)` turns
them into a figure. The written SVG names a digest of its data, so a test can tell, without
drawing, that a committed picture still shows what the library computes.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

RANKS = ("#4477aa", "#ee7733", "#228833", "#aa3377", "#66ccee", "#ccbb44", "#882255", "#777777")
"""One colour per rank, told apart by most colour-blind readers (Paul Tol's palettes)."""

INK = "#22262b"
FAINT = "#8a9099"
EMPTY = "#eef0f3"

SETTINGS = {
    "svg.hashsalt": "dtcp",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.linewidth": 0.8,
    "axes.titlesize": 10,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
}


def figure(width: float, height: float) -> Figure:
    """An empty white figure; inches."""
    return Figure(figsize=(width, height), facecolor="white")


def title(fig: Figure, text: str, below: str) -> None:
    """A headline at the top left, and a sentence under it."""
    width, height = fig.get_size_inches()
    fig.text(0.15 / width, 1 - 0.16 / height, text, size=12.5, weight="bold", va="top")
    fig.text(0.15 / width, 1 - 0.44 / height, below, size=9, color="#555b63", va="top")


def bare(ax: Axes) -> None:
    """Leave out frame and ticks."""
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set_visible(False)


def digest(data: Any) -> str:
    """The name of a picture's data: equal data, equal name."""
    text = json.dumps(data, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write(fig: Figure, data: Any, path: Path) -> None:
    """Write a picture: the same bytes for the same data and the same matplotlib."""
    about = {"Date": None, "Creator": None, "Description": f"data {digest(data)}"}
    fig.savefig(path, format=path.suffix[1:], metadata=about if path.suffix == ".svg" else None)


def settings() -> Any:
    """The context in which figures are made and written."""
    return matplotlib.rc_context(SETTINGS)
