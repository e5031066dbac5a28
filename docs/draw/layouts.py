"""Who holds which token in each layout, and how much attention that gives each rank."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from docs.draw.canvas import EMPTY, FAINT, INK, RANKS, bare, figure, title
from dtcp import BlockBalanced, Causal, Contiguous, Documents, HeadTail, PerDocument
from dtcp.sequence.coords import Coords
from dtcp.sequence.layout import SequenceLayout

RANKS_USED = 4
PACKED = Documents(lengths=((26, 9, 21, 8),), seq_len=64)
SINGLE = Documents.single(1, 64)
LAYOUTS = (Contiguous, HeadTail, PerDocument, BlockBalanced)


def data() -> dict[str, Any]:
    """The holder of each token and the keys that each rank's queries see, by layout."""
    shown = {}
    for kind in LAYOUTS:
        layout = kind.for_batch(PACKED, RANKS_USED)
        holder = [0] * PACKED.seq_len
        for rank in range(RANKS_USED):
            for token in layout.token_indices(rank).tolist():
                holder[token] = rank
        shown[kind.__name__] = {
            "holder": holder,
            "single": keys_seen(kind, SINGLE),
            "packed": keys_seen(kind, PACKED),
        }
    return {"lengths": list(PACKED.lengths[0]), "layouts": shown}


def keys_seen(kind: type[SequenceLayout], documents: Documents) -> list[int]:
    """Keys that the queries of each rank see under a causal mask, all queries added up."""
    first, last = Causal().intervals(Coords.of(documents))
    seen = (last - first + 1)[0]
    layout = kind.for_batch(documents, RANKS_USED)
    return [int(seen[layout.token_indices(rank)].sum()) for rank in range(RANKS_USED)]


def draw(data: dict[str, Any]) -> Figure:
    fig = figure(11, 4.2)
    title(
        fig,
        "Who holds which token",
        "A row of 64 tokens, four packed documents, on 4 ranks. Right: keys that the queries of "
        "each rank see (causal); bold: busiest rank divided by the mean.",
    )
    strips = fig.add_axes((0.115, 0.125, 0.5, 0.68))
    single = fig.add_axes((0.64, 0.125, 0.165, 0.68))
    packed = fig.add_axes((0.82, 0.125, 0.165, 0.68))
    _documents(strips, data["lengths"])
    for row, (name, shown) in enumerate(data["layouts"].items()):
        _strip(strips, row, name, shown["holder"])
        _bars(single, row, shown["single"], most=1120)
        _bars(packed, row, shown["packed"], most=300)
    for ax, text in ((single, "if the row is one document"), (packed, "with the four documents")):
        ax.text(0, -0.47, text, size=8.5, va="bottom")
    for ax in (strips, single, packed):
        bare(ax)
        ax.set_ylim(len(data["layouts"]) - 0.5, -0.75)
    seq_len = sum(data["lengths"])
    strips.set_xlim(0, seq_len)
    strips.set_xticks(range(0, seq_len + 1, 8))
    strips.tick_params(length=3, color=FAINT)
    strips.set_xlabel("token index in the row", labelpad=3)
    _legend(fig)
    return fig


def _documents(ax: Axes, lengths: list[int]) -> None:
    start = 0
    for index, length in enumerate(lengths):
        ax.plot([start + 0.25, start + length - 0.25], [-0.38] * 2, color=INK, lw=1.4)
        text = f"document {index}: {length} tokens" if length > 12 else f"{index}: {length}"
        ax.text(start + length / 2, -0.47, text, ha="center", va="bottom", size=8.5)
        start += length


def _strip(ax: Axes, row: int, name: str, holder: list[int]) -> None:
    for token, rank in enumerate(holder):
        ax.add_patch(Rectangle((token, row - 0.28), 1, 0.56, fc=RANKS[rank], ec="white", lw=0.6))
    ax.text(-1, row, name, ha="right", va="center", size=9.5, weight="bold")


def _bars(ax: Axes, row: int, work: list[int], *, most: int) -> None:
    for rank, keys in enumerate(work):
        y = row - 0.28 + 0.14 * rank
        ax.add_patch(Rectangle((0, y), most, 0.12, fc=EMPTY))
        ax.add_patch(Rectangle((0, y), keys, 0.12, fc=RANKS[rank]))
        ax.text(most * 0.985, y + 0.063, f"{keys}", size=6.5, va="center", ha="right")
    ratio = max(work) * len(work) / sum(work)
    ax.text(most * 1.05, row, f"{ratio:.2f}", size=10.5, weight="bold", va="center")
    ax.set_xlim(0, most * 1.3)


def _legend(fig: Figure) -> None:
    for rank in range(RANKS_USED):
        x = 0.64 + 0.075 * rank
        square = Rectangle((x, 0.036), 0.013, 0.033, fc=RANKS[rank], transform=fig.transFigure)
        fig.patches.append(square)
        fig.text(x + 0.018, 0.0525, f"rank {rank}", size=8.5, va="center")
