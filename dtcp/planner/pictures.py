"""Pictures of a plan, for readers who do not know the project: matplotlib figures."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dtcp.planner.cluster import GB, Cluster
from dtcp.planner.forecast import from_other_nodes
from dtcp.planner.report import checkpoint_name, mesh_name, strategy_name
from dtcp.planner.search import Candidate, Search
from dtcp.planner.trace import OUTSIDE
from dtcp.sequence.layout import SequenceLayout
from dtcp.sequence.row_layouts import RowLayouts

COLORS = ("#2f6fb0", "#d9822b", "#4a9c5d", "#b5485d", "#7b5ea7", "#8a6d3b", "#3aa6a6", "#999999")
MOST_RANKS = 32
PARTS: Mapping[str, str] = {
    "parameters": "weights, this GPU's share",
    "optimizer": "optimizer's states",
    "gradients": "gradients",
    "activations": "activations kept for backward",
    "workspace": "work in progress",
    "gathered": "weights gathered for use",
    "inputs": "the batch",
}


def pictures(search: Search, cluster: Cluster) -> dict[str, tuple[str, Any]]:
    """(what it shows, figure) by name; all but the last two show the best setup."""
    best = search.best
    drawn: Mapping[str, tuple[str, Callable[..., Any]]] = {
        "tokens": (
            "Which GPU holds which tokens of one row. The row runs from left to right; each line "
            "is a GPU of the context-parallel group, coloured where the tokens are its own.",
            lambda: _tokens(best),
        ),
        "work": (
            "Attention work of each GPU in one pass over its part of a row, by kind of layer "
            "(forward, recomputation and backward). Equal bars mean that no GPU waits for another.",
            lambda: _work(best),
        ),
        "exchange": (
            "Who sends how much to whom in a step, for attention: each line is what one GPU "
            "receives, from left to right by sender. A dark square is much traffic; on the "
            "diagonal a GPU would send to itself, which moves nothing.",
            lambda: _exchange(best),
        ),
        "layer": (
            "One layer, forward and backward: what computes, what is transferred meanwhile, and "
            "what is waited for.",
            lambda: _layer(best, cluster),
        ),
        "memory": (
            "Memory of a GPU at its fullest moment, by what it is for. Bars that cross the black "
            "line do not fit.",
            lambda: _memory(search, cluster),
        ),
        "meshes": (
            "Modelled speed of the setups that fit, best first; beside each bar, what takes most "
            "of its time.",
            lambda: _meshes(search),
        ),
    }
    return {name: (text, draw()) for name, (text, draw) in drawn.items()}


def _figure(height: float = 3.4) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _tokens(best: Candidate) -> Any:
    setup = best.setup
    layout = _layout_of(best)
    ranks = range(min(layout.num_shards, MOST_RANKS))
    figure, axes = _figure(1.2 + 0.28 * len(ranks))
    for rank in ranks:
        runs = [(start, stop - start) for start, stop in layout.runs(rank)]
        axes.broken_barh(runs, (rank - 0.4, 0.8), color=COLORS[rank % len(COLORS)])
    ends = np.cumsum(setup.documents.lengths[0])[:-1]
    if len(ends) <= 64:
        for end in ends:
            axes.axvline(end, color="#333333", lw=0.6, ls=":")
    axes.set_yticks(list(ranks), [f"GPU {rank}" for rank in ranks])
    axes.invert_yaxis()
    axes.set_xlim(0, layout.seq_len)
    axes.set_xlabel("token of the row (dotted lines: ends of documents)")
    axes.set_title(f"Tokens of each GPU, layout {setup.layout.__name__}")
    return figure


def _layout_of(best: Candidate) -> SequenceLayout:
    """The layout of the batch's first row."""
    layout = best.forecast.layout
    assert layout is not None
    return layout.rows[0] if isinstance(layout, RowLayouts) else layout


def _work(best: Candidate) -> Any:
    figure, axes = _figure()
    ranks = best.forecast.ranks
    below = np.zeros(len(ranks))
    names = [f"{rank.cp_rank}" for rank in ranks]
    kinds = [mixer.part for mixer in ranks[0].mixers]
    for index, kind in enumerate(kinds):
        flops = np.array(
            [
                sum(
                    m.count * (m.forward_flops + m.backward_flops)
                    for m in r.mixers
                    if m.part == kind
                )
                for r in ranks
            ]
        )
        if flops.any():
            label = "other" if kind == OUTSIDE else _kind_name(best, kind)
            axes.bar(names, flops / 1e12, bottom=below, color=COLORS[index % 8], label=label)
            below = below + flops / 1e12
    axes.set_xlabel("GPU of the context-parallel group")
    axes.set_ylabel("TFLOP (10^12 operations)")
    axes.set_title("Attention work of each GPU")
    axes.legend(loc="lower right", frameon=True)
    return figure


def _kind_name(best: Candidate, kind: str) -> str:
    """How a kind of layer is called, with how many there are."""
    count = next(each.count for each in best.forecast.ranks[0].mixers if each.part == kind)
    return f"{count} layers like {kind}" if count > 1 else kind


def _exchange(best: Candidate) -> Any:
    ranks, cp = best.forecast.ranks, best.setup.degrees.cp
    table = np.zeros((len(ranks), cp))
    for row, rank in enumerate(ranks):
        for mixer in rank.mixers:
            for moved in (mixer.forward, mixer.backward):
                for peer, size in enumerate(moved.received):
                    table[row, peer] += mixer.count * size * best.setup.micro_batches
    figure, axes = _figure(2.2 + 0.22 * len(ranks))
    shown = axes.imshow(table / GB, cmap="Blues", aspect="auto")
    figure.colorbar(shown, ax=axes, label="GB per step")
    if cp <= 16:
        for row, sizes in enumerate(table):
            for column, size in enumerate(sizes):
                dark = size > 0.6 * table.max()
                color = "white" if dark else "black"
                text = f"{size / GB:.1f}"
                axes.text(column, row, text, ha="center", va="center", color=color, fontsize=8)
    axes.set_yticks(range(len(ranks)), [f"GPU {rank.cp_rank}" for rank in ranks])
    axes.set_xlabel("sending GPU of the context-parallel group")
    axes.set_ylabel("receiving GPU")
    axes.set_title(f"Attention's traffic, {strategy_name(best.setup)}")
    return figure


def _layer(best: Candidate, cluster: Cluster) -> Any:
    forecast, setup = best.forecast, best.setup
    kinds = [mixer for mixer in forecast.busiest.mixers if mixer.part != OUTSIDE]
    figure, axes = _figure(1.6 + 1.1 * max(1, len(kinds)))
    labels, y = [], 0.0
    used: set[str] = set()
    for mixer in kinds:
        start = 0.0
        for backward in (False, True):
            flops = mixer.backward_flops if backward else mixer.forward_flops
            moved = mixer.backward if backward else mixer.forward
            matmuls = sum(
                n / mixer.count
                for place, n in forecast.matmul_flops.items()
                if place.part == mixer.part and place.backward == backward
            )
            attention = flops / (cluster.flops * cluster.mixer)
            rest = matmuls / (cluster.flops * cluster.matmul)
            crossing = from_other_nodes(
                moved, forecast.busiest.cp_rank, setup.degrees.tp, cluster.ranks_per_node
            )
            transfer = cluster.seconds(sum(moved.received), crossing)
            hidden = min(transfer, attention) if strategy_name(setup) == "ring" else 0.0
            for name, at, length, line, color in (
                ("attention computes", start, attention, y, COLORS[0]),
                ("matmuls", start + attention + transfer - hidden, rest, y, COLORS[2]),
                ("waited for", start + attention, transfer - hidden, y, COLORS[3]),
                ("transfer", start, transfer, y + 0.8, COLORS[1]),
            ):
                if length:
                    label = name if name not in used else None
                    used.add(name)
                    axes.barh(
                        line, length * 1e3, left=at * 1e3, height=0.7, color=color, label=label
                    )
            start += attention + transfer - hidden + rest
            axes.axvline(start * 1e3, color="#bbbbbb", lw=0.6)
        labels += [(y, f"{mixer.part}: compute"), (y + 0.8, "transfer")]
        y += 2.2
    axes.set_yticks([at for at, _ in labels], [text for _, text in labels])
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds (first forward, then backward with recomputation)")
    axes.set_title("Time of one layer of each kind")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.25), ncols=4, frameon=False)
    return figure


def _memory(search: Search, cluster: Cluster) -> Any:
    shown = [*search.candidates[:6], *[c for c in search.candidates if not c.fits][:3]]
    shown = list({id(candidate): candidate for candidate in shown}.values())
    figure, axes = _figure(1.6 + 0.4 * len(shown))
    names = [_name(candidate) for candidate in shown]
    left = np.zeros(len(shown))
    for index, (part, label) in enumerate(PARTS.items()):
        sizes = np.array([c.forecast.memory.parts()[part] / GB for c in shown])
        axes.barh(range(len(shown)), sizes, left=left, color=COLORS[index], label=label)
        left = left + sizes
    axes.axvline(cluster.usable / GB, color="black", lw=1.2)
    axes.set_yticks(range(len(shown)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(f"GB (a {cluster.name} has {cluster.usable / GB:.0f} for tensors)")
    axes.set_title("Memory of a GPU at its fullest")
    axes.legend(loc="upper center", bbox_to_anchor=(0.3, -0.18), ncols=3, frameon=False, fontsize=8)
    return figure


def _meshes(search: Search) -> Any:
    shown: Sequence[Candidate] = [c for c in search.candidates if c.fits][:12]
    figure, axes = _figure(1.4 + 0.32 * max(1, len(shown)))
    names = [_name(candidate) for candidate in shown]
    axes.barh(
        range(len(shown)), [candidate.tokens_per_second for candidate in shown], color=COLORS[0]
    )
    for row, candidate in enumerate(shown):
        axes.text(
            candidate.tokens_per_second, row, f"  {candidate.time.bound}", va="center", fontsize=8
        )
    axes.set_yticks(range(len(shown)), names, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("tokens/s of all GPUs together")
    axes.set_title("Setups that fit")
    return figure


def _name(candidate: Candidate) -> str:
    setup = candidate.setup
    rows = f", {setup.documents.batch} rows" if setup.documents.batch > 1 else ""
    where = f"{mesh_name(setup)}, {strategy_name(setup)}"
    return f"{where}, {setup.layout.__name__}, {checkpoint_name(setup)}{rows}"
