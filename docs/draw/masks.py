"""A mask before and after balance: the queries of each rank, and the keys that they see."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from docs.draw.canvas import EMPTY, FAINT, RANKS, figure, title
from dtcp import Causal, Contiguous, Documents, HeadTail, PerDocument, SlidingWindow
from dtcp.sequence.coords import Coords

RANKS_USED = 4
SINGLE = Documents.single(1, 64)
PACKED = Documents(lengths=((26, 9, 21, 8),), seq_len=64)
PANELS = (
    ("causal, one document", Causal(), SINGLE, Contiguous),
    ("causal, one document", Causal(), SINGLE, HeadTail),
    ("causal, four documents", Causal(), PACKED, HeadTail),
    ("causal, four documents", Causal(), PACKED, PerDocument),
    ("window of 12", Causal() & SlidingWindow(12), SINGLE, Contiguous),
    ("window of 12", Causal() & SlidingWindow(12), SINGLE, HeadTail),
)


def data() -> list[dict[str, Any]]:
    """For each panel the keys that the query in each slot sees: first and last, by token index."""
    panels = []
    for name, mask, documents, kind in PANELS:
        layout = kind.for_batch(documents, RANKS_USED)
        coords = Coords.of(documents)
        order = layout.permutation()
        first, last = (x[0, order].tolist() for x in mask.intervals(coords))
        panels.append({"mask": name, "layout": kind.__name__, "first": first, "last": last})
    return panels


def draw(data: list[dict[str, Any]]) -> Figure:
    width, height = 11.0, 7.0
    fig = figure(width, height)
    title(
        fig,
        "A mask, before and after balance",
        "Rows are queries, in the order in which 4 ranks hold them; coloured are the keys they "
        "see. Bars: keys seen per rank; bold: busiest divided by mean.",
    )
    for index, panel in enumerate(data):
        x = (0.07, 0.4, 0.73)[index // 2]
        y = (0.505, 0.075)[index % 2]
        ax = fig.add_axes((x, y, 0.2, 0.2 * width / height))
        _panel(ax, panel)
        _bars(fig.add_axes((x + 0.203, y, 0.06, 0.2 * width / height)), panel)
        if index % 2 == 0:
            fig.text(x, 0.868, panel["mask"], size=10.5, weight="bold", color="#555b63")
        else:
            ax.set_xlabel("key, by token index")
    return fig


def _panel(ax: Axes, panel: dict[str, Any]) -> None:
    seq_len = len(panel["first"])
    each = seq_len // RANKS_USED
    picture = np.empty((seq_len, seq_len, 3))
    picture[:] = to_rgb(EMPTY)
    for slot, (first, last) in enumerate(zip(panel["first"], panel["last"], strict=True)):
        picture[slot, first : last + 1] = to_rgb(RANKS[slot // each])
    ax.imshow(picture, extent=(0, seq_len, seq_len, 0), interpolation="nearest", aspect="auto")
    for rank in range(RANKS_USED):
        ax.axhline(rank * each, color="white", lw=1.5)
        ax.text(-1.5, (rank + 0.5) * each, f"rank {rank}", size=8, ha="right", va="center")
    ax.set_title(panel["layout"], size=9.5, loc="left", weight="bold", pad=4)
    ax.set_yticks([])
    ax.set_xticks(range(0, seq_len + 1, 16))
    ax.tick_params(length=3, color=FAINT)
    ax.spines[:].set_visible(False)


def _bars(ax: Axes, panel: dict[str, Any]) -> None:
    """Keys seen by the queries of each rank."""
    pairs = list(zip(panel["first"], panel["last"], strict=True))
    each = len(pairs) // RANKS_USED
    work = [
        sum(last - first + 1 for first, last in pairs[rank * each : (rank + 1) * each])
        for rank in range(RANKS_USED)
    ]
    ax.set_ylim(RANKS_USED, 0)
    ax.set_xlim(0, max(work) * 1.75)
    for rank, keys in enumerate(work):
        ax.barh(rank + 0.5, keys, height=0.5, color=RANKS[rank])
        ax.text(keys + max(work) * 0.06, rank + 0.5, f"{keys}", size=7.5, va="center")
    ratio = max(work) * RANKS_USED / sum(work)
    ax.axis("off")
    ax.set_title(f"{ratio:.2f}", size=9.5, loc="left", weight="bold", pad=4)
