"""The steps of a ring: who sends keys to whom, and which part of the mask each step computes."""

from math import cos, pi, sin
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch

from docs.draw.canvas import EMPTY, INK, RANKS, bare, figure, title
from dtcp import Causal, Documents, HeadTail
from dtcp.sequence.coords import Coords
from dtcp.sequence.key_intervals import KeyIntervals
from dtcp.softmax.required_keys import required_keys

RANKS_USED = 4
DOCUMENTS = Documents.single(1, 64)
BEND = -0.22


def data() -> dict[str, Any]:
    """Tokens that each rank receives in each step, and the keys that each query sees, by slot."""
    layout = HeadTail.for_batch(DOCUMENTS, RANKS_USED)
    coords = Coords.of(DOCUMENTS)
    intervals = Causal().intervals(coords)
    received = []
    for rank in range(RANKS_USED):
        keys = required_keys(layout, rank, KeyIntervals.of(Causal(), coords)).receive_tokens
        by_step = [
            keys.counts(RANKS_USED)[(rank - step) % RANKS_USED] for step in range(RANKS_USED)
        ]
        received.append([layout.shard_len, *map(int, by_step[1:])])
    order = layout.permutation()
    first, last = (x[0, order] for x in intervals)
    seen = (order[None] >= first[:, None]) & (order[None] <= last[:, None])
    return {"received": received, "seen": ["".join("01"[x] for x in row) for row in seen.tolist()]}


def draw(data: dict[str, Any]) -> Figure:
    width, height = 11.0, 6.0
    fig = figure(width, height)
    title(
        fig,
        "A ring of 4 ranks, step by step",
        "64 tokens, HeadTail, causal. Numbers: tokens whose keys and values travel, straight from "
        "the rank that holds them; what no query needs stays.",
    )
    for step in range(RANKS_USED):
        x = 0.055 + 0.238 * step
        circle = fig.add_axes((x + 0.01, 0.488, 0.196, 0.196 * width / height))
        _circle(circle, step, [received[step] for received in data["received"]])
        matrix = fig.add_axes((x + 0.008, 0.08, 0.2, 0.2 * width / height))
        _matrix(matrix, step, data["seen"], labelled=step == 0)
        back = "own keys" if step == 0 else f"keys from {step} rank{'s' * (step > 1)} back"
        circle.set_title(f"step {step}: {back}", size=9.5, weight="bold", pad=2)
    return fig


def _circle(ax: Axes, step: int, received: list[int]) -> None:
    places = [
        (cos(pi * (0.75 - rank / 2)), sin(pi * (0.75 - rank / 2))) for rank in range(RANKS_USED)
    ]
    for rank, tokens in enumerate(received):
        source = (rank - step) % RANKS_USED
        if step:
            _arrow(ax, places[source], places[rank], tokens, RANKS[source])
    for rank, place in enumerate(places):
        ax.add_patch(Circle(place, 0.3, fc=RANKS[rank], ec="white", lw=1.5, zorder=3))
        text = f"rank\n{rank}"
        ax.text(*place, text, color="white", size=8, ha="center", va="center", zorder=4)
    if step == 0:
        ax.text(0, 0, "nothing\ntravels", ha="center", va="center", size=8.5)
    ax.set_xlim(-1.35, 1.35)
    ax.set_ylim(-1.35, 1.35)
    bare(ax)


def _arrow(
    ax: Axes, start: tuple[float, float], stop: tuple[float, float], tokens: int, color: str
) -> None:
    arrow = FancyArrowPatch(
        start,
        stop,
        connectionstyle=f"arc3,rad={BEND}",
        arrowstyle="-|>",
        mutation_scale=13,
        shrinkA=20,
        shrinkB=21,
        lw=0.8 + tokens / 7,
        color=color,
        zorder=2,
    )
    ax.add_patch(arrow)
    dx, dy = stop[0] - start[0], stop[1] - start[1]
    crosses = abs(dx) > 1 and abs(dy) > 1
    # A point of the arrow's curve, a quarter of the way where arrows cross, else half.
    t = 0.32 if crosses else 0.5
    bend = 2 * t * (1 - t) * BEND
    x, y = start[0] + t * dx + bend * dy, start[1] + t * dy - bend * dx
    box = {"boxstyle": "round,pad=0.12", "fc": "white", "ec": "none"}
    ax.text(x, y, f"{tokens}", size=8.5, color=INK, ha="center", va="center", bbox=box, zorder=5)


def _matrix(ax: Axes, step: int, seen: list[str], *, labelled: bool) -> None:
    size = len(seen)
    each = size // RANKS_USED
    picture = np.empty((size, size, 3))
    for query in range(size):
        for key in range(size):
            rank, holder = query // each, key // each
            now = (rank - holder) % RANKS_USED == step
            color = "white" if seen[query][key] == "0" else RANKS[holder] if now else "#cfd4da"
            picture[query, key] = to_rgb(EMPTY if color == "white" else color)
    ax.imshow(picture, extent=(0, size, size, 0), interpolation="nearest", aspect="auto")
    for rank in range(1, RANKS_USED):
        ax.axhline(rank * each, color="white", lw=1.5)
        ax.axvline(rank * each, color="white", lw=1.5)
    middles = [(rank + 0.5) * each for rank in range(RANKS_USED)]
    ax.set_xticks(middles, [f"{rank}" for rank in range(RANKS_USED)])
    ax.set_yticks(middles, [f"{rank}" for rank in range(RANKS_USED)] if labelled else [])
    ax.tick_params(length=0)
    ax.set_xlabel("rank that holds the key", size=8.5)
    if labelled:
        ax.set_ylabel("rank that holds the query", size=8.5)
    ax.spines[:].set_visible(False)
