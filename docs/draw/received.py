"""Bytes that the busiest rank receives for one attention layer, by strategy and number of ranks."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from docs.draw.canvas import FAINT, RANKS, figure, title
from dtcp import (
    AttentionStyle,
    Causal,
    Documents,
    HaloAttention,
    HeadTail,
    HybridAttention,
    RingAttention,
    SlidingWindow,
    SoftmaxAttention,
    UlyssesAttention,
)
from dtcp.sequence.coords import Coords
from dtcp.sequence.masks import Mask
from dtcp.softmax.moves import AttentionShape

SEQ_LEN = 32_768
SHAPE = AttentionShape(batch=1, heads=32, kv_heads=8, key_dim=128, value_dim=128, element_size=2)
NUM_RANKS = (2, 4, 8, 16, 32)
WINDOW = 1024
WHOLE = Documents.single(1, SEQ_LEN)
PACKED = Documents(((2048,) * 16,), SEQ_LEN)
CASES: dict[str, tuple[AttentionStyle, Mask, Documents]] = {
    "ring or all-gather, one document": (RingAttention(), Causal(), WHOLE),
    "ring or all-gather, 16 documents": (RingAttention(), Causal(), PACKED),
    "Ulysses, any mask": (UlyssesAttention(), Causal(), WHOLE),
    "hybrid, Ulysses inside groups of 4": (HybridAttention(inner_ranks=4), Causal(), WHOLE),
    "halo, a window of 1024": (HaloAttention(WINDOW), Causal() & SlidingWindow(WINDOW), WHOLE),
}


def data() -> dict[str, list[tuple[int, int]]]:
    """(ranks, bytes that the busiest rank receives forward), by the strategies' formulas."""
    return {
        name: [_point(n, *case) for n in NUM_RANKS if _fits(n, case[0])]
        for name, case in CASES.items()
    }


def draw(data: dict[str, list[tuple[int, int]]]) -> Figure:
    fig = figure(11, 4.6)
    title(
        fig,
        "What an attention layer receives",
        "MiB per forward pass, busiest rank, by each strategy's own formula. A row of 32,768 "
        "tokens, HeadTail, causal, bf16, 32 query and 8 kv heads of 128.",
    )
    ax = fig.add_axes((0.075, 0.125, 0.57, 0.7))
    ends = [points[-1][1] / 2**20 for points in data.values()]
    for index, (name, points) in enumerate(data.items()):
        _line(ax, name, points, RANKS[index], label_at=_apart(ends)[index])
    ax.set_xscale("log", base=2)
    ax.set_xticks(NUM_RANKS, [f"{n}" for n in NUM_RANKS])
    ax.set_xlim(1.85, 35)
    ax.set_ylim(-4, 175)
    ax.set_xlabel("ranks on the axis cp")
    ax.set_ylabel("MiB received, forward")
    ax.grid(axis="y", color=FAINT, lw=0.4, alpha=0.5)
    ax.spines[["top", "right"]].set_visible(False)
    return fig


def _apart(values: list[float]) -> list[float]:
    """The values, each at least a line of text above the next lower one."""
    places = list(values)
    below = -10.0
    for index in sorted(range(len(values)), key=lambda i: values[i]):
        places[index] = below = max(values[index], below + 8)
    return places


def _line(
    ax: Axes, name: str, points: list[tuple[int, int]], color: str, *, label_at: float
) -> None:
    ranks = [n for n, _ in points]
    mebibytes = [received / 2**20 for _, received in points]
    ax.plot(ranks, mebibytes, color=color, lw=2.2, marker="o", ms=5, clip_on=False)
    text = f"{name}  ({mebibytes[-1]:.0f})"
    ax.text(37, label_at, text, color=color, size=9, weight="bold", va="center")


def _fits(num_ranks: int, style: AttentionStyle) -> bool:
    """Whether a strategy runs on so many ranks with these heads."""
    if isinstance(style, HybridAttention):
        return num_ranks > style.inner_ranks
    return num_ranks <= SHAPE.heads or not isinstance(style, UlyssesAttention)


def _point(
    num_ranks: int, style: AttentionStyle, mask: Mask, documents: Documents
) -> tuple[int, int]:
    layout = HeadTail.for_batch(documents, num_ranks)
    of = (SoftmaxAttention(mask), Coords.of(documents), layout)
    most = max(style.received(*of, rank, SHAPE).forward for rank in range(num_ranks))
    return num_ranks, most
