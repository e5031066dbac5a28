"""How layouts deal out packed rows: work, keys to bring, pieces, time to plan, and a model of time.

    python -m benchmarks.balance
    python -m benchmarks.balance --write cpu

8,192 tokens a rank on 8, 64 and 512 ranks; rows of three suites, a causal mask. There no ranks run:
work and keys are counted, planning is timed on one core, and what a layer's attention would take is
a model whose every number is printed with it. Then steps of a tiny model on 2 and 4 real ranks
(benchmarks/balance_steps.py), unless --no-steps.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure

from benchmarks.balance_baselines import (
    LAYOUTS,
    SUITES,
    Figures,
    figures_of,
    received_by_nodes,
    rows_of,
)
from benchmarks.balance_bounds import fewest_keys
from benchmarks.balance_steps import report
from benchmarks.report import RESULTS, conditions, publish, table
from dtcp.sequence.block_balanced import BlockBalanced
from dtcp.sequence.coords import Coords
from dtcp.sequence.document_balanced import DocumentBalanced
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import HeadTail, SequenceLayout
from dtcp.sequence.mask_work import MaskWork
from dtcp.sequence.masks import Causal, SlidingWindow
from dtcp.sequence.per_document import PerDocument
from dtcp.softmax import AllGatherAttention, HaloAttention, RingAttention
from dtcp.softmax.mixer import SoftmaxAttention
from dtcp.softmax.style import AttentionStyle

TOKENS_A_RANK = 8192
RANKS = (8, 64, 512)
IMBALANCE = 1.01
"""Most work of a rank, of the mean, up to which lower bounds hold."""


@dataclass(frozen=True)
class Model:
    """What a layer's attention takes: a Llama-3.1-8B's, forward and backward, bf16."""

    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    flops: float = 600e12  # a second
    inside: float = 450e9  # bytes a second and rank, in a node
    between: float = 50e9  # bytes a second and rank, between nodes
    node: int = 8  # ranks

    def computing(self, figures: Figures) -> float:
        """Seconds of the rank with the most work: scores and values, and 2.5 times as much back."""
        return float(figures.work.max()) * 4 * self.heads * self.head_dim * 3.5 / self.flops

    def moving(self, figures: Figures, num_shards: int) -> float:
        """Seconds of the busiest rank, owner to user; links between nodes bear what is not inside.

        Keys come forward and again backward, and their gradients go home.
        """
        busiest = max((2 * figures.received + figures.sent).max(), (2 * figures.sent).max())
        share = 0.0 if num_shards == self.node else 1 - (self.node - 1) / (num_shards - 1)
        return float(busiest) * self.row * (share / self.between + (1 - share) / self.inside)

    def moving_once_a_node(self, figures: Figures, by_node: Sequence[int]) -> float:
        """Seconds if a key entered a node once, dealt to its ranks, and were spread inside it."""
        entering = max(by_node) / self.node
        inside = float(figures.received.max())
        return 3 * self.row * (entering / self.between + inside / self.inside)

    @property
    def row(self) -> int:
        """Bytes of a token's K and V."""
        return 2 * self.kv_heads * self.head_dim * 2


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(1)
    parts = [
        conditions("benchmarks.balance", {"packs": arguments.packs, "rows": arguments.rows}),
        *_of_suites(arguments),
    ]
    parts.append(_many_rows(arguments.rows))
    parts.append(_planning(arguments.repeats))
    if arguments.steps:
        parts.append(report((2, 4), 2048, arguments.repeats, 30, lambda _: None))
    text = "# Balance of packed rows\n\n" + "\n\n".join(parts) + "\n"
    publish("balance", arguments.write, text)


def _of_suites(arguments: argparse.Namespace) -> list[str]:
    """Tables of all suites and numbers of ranks; a picture of those on 64 ranks."""
    parts, shown = [], {}
    for num_shards in RANKS:
        for suite in SUITES:
            rows = rows_of(suite, num_shards * TOKENS_A_RANK, arguments.packs)
            by_name = {name: _layout_row(make, rows, num_shards) for name, make in LAYOUTS.items()}
            head = ("layout", "max / mean work", "keys to bring", "most sent", "pieces", "most")
            head += ("ms a layer", "moved under it", "keys once a node")
            cells = [[name, *cells] for name, (_, cells) in by_name.items()]
            bound = statistics.fmean(_fewest(documents, num_shards) for documents in rows)
            cells.append(["lower bound", f"{IMBALANCE}", f"{bound:.3f}", *["-"] * (len(head) - 3)])
            parts.append(f"## {suite}, {num_shards} ranks\n\n{table(head, cells)}")
            if num_shards == 64:
                shown[suite] = {name: point for name, (point, _) in by_name.items()}
    if arguments.write:
        _draw(shown).savefig(RESULTS / f"balance_{arguments.write}.svg", bbox_inches="tight")
    model = ", ".join(f"{name} {value:g}" for name, value in vars(Model()).items())
    notes = (
        "Keys to bring: tokens whose keys a rank needs from others, of all tokens; mean over ranks "
        "and rows; no layout with equal tokens and so much work at most brings less than the lower "
        "bound. Most sent: by one rank, to all. The last three columns are a model, not a "
        f"measurement ({model}): computing and then moving keys from owner to user, the greater of "
        "the two, and the greater of the two if a key entered each node once."
    )
    return [notes, *parts]


def _layout_row(
    make: Callable[[Documents, int], SequenceLayout], rows: list[Documents], num_shards: int
) -> tuple[tuple[float, float], list[str]]:
    """(imbalance, keys to bring), and the cells of a table."""
    model, samples = Model(), []
    for documents in rows:
        layout = make(documents, num_shards)
        figures = figures_of(layout, documents)
        computing, moving = model.computing(figures), model.moving(figures, num_shards)
        once = computing + moving, max(computing, moving), float("nan")
        if num_shards > model.node:
            by_node = received_by_nodes(layout, documents, num_shards // model.node)
            once = (*once[:2], max(computing, model.moving_once_a_node(figures, by_node)))
        share = figures.received.mean() / layout.seq_len
        sent, pieces = figures.sent.max() / layout.seq_len, figures.pieces
        samples.append((figures.imbalance, share, sent, pieces.mean(), pieces.max(), *once))
    means = [statistics.fmean(values) for values in zip(*samples, strict=True)]
    imbalance, share, sent, pieces, most, *times = means
    cells = [f"{imbalance:.4f}", f"{share:.3f}", f"{sent:.3f}", f"{pieces:.1f}", f"{most:.0f}"]
    return (imbalance, share), [*cells, *("-" if x != x else f"{1e3 * x:.2f}" for x in times)]


def _fewest(documents: Documents, num_shards: int) -> float:
    return fewest_keys(documents, num_shards, imbalance=IMBALANCE)


def _many_rows(count: int) -> str:
    """Of a few rows, the mean is that of the longest documents among them: of more, on 64 ranks."""
    cells = []
    for suite in ("lognormal", "mixture"):
        rows = rows_of(suite, 64 * TOKENS_A_RANK, count)
        for name in ("Contiguous", "HeadTail", "greedy chunks (2048)", "DocumentBalanced"):
            figures = [figures_of(LAYOUTS[name](documents, 64), documents) for documents in rows]
            shares = [x.received.mean() / (64 * TOKENS_A_RANK) for x in figures]
            worst = max(x.imbalance for x in figures)
            _, (*_, moved_under, once) = _layout_row(LAYOUTS[name], rows, 64)
            cells.append([suite, name, f"{worst:.4f}", *_spread(shares), moved_under, once])
        bounds = [_fewest(documents, 64) for documents in rows]
        cells.append([suite, "lower bound", f"{IMBALANCE}", *_spread(bounds), "-", "-"])
    head = ("suite", "layout", "worst max / mean work", "keys to bring, mean", "median", "least")
    head = (*head, "most", "ms, moved under it", "keys once a node")
    return f"## {count} rows of a suite, 64 ranks\n\n{table(head, cells)}"


def _spread(shares: list[float]) -> list[str]:
    numbers = statistics.fmean(shares), statistics.median(shares), min(shares), max(shares)
    return [f"{x:.3f}" for x in numbers]


def _planning(repeats: int) -> str:
    """A batch on the host: its layout, and what windows and global layers of a Gemma 4 read."""
    documents = rows_of("lognormal", 2**19, 1)[0]
    styles: tuple[AttentionStyle, ...] = (AllGatherAttention(), RingAttention())
    cells = []
    for layout in (DocumentBalanced, HeadTail, PerDocument, BlockBalanced):
        for style in styles:
            times = [_plan_ms(documents, layout, style, n, repeats) for n in RANKS]
            cells.append([layout.__name__, type(style).__name__, *(f"{x:.1f}" for x in times)])
    head = ("layout", "global layers", *(f"{n} ranks" for n in RANKS))
    return (
        f"## Planning, ms of CPU\n\n{len(documents.lengths[0])} documents in 512K tokens; a window "
        f"of 1,024 beside global layers; the layout and both kinds of metadata; least of "
        f"{repeats}.\n\n{table(head, cells)}"
    )


def _plan_ms(
    documents: Documents,
    layout: type[SequenceLayout],
    style: AttentionStyle,
    num_shards: int,
    repeats: int,
) -> float:
    everywhere = SoftmaxAttention(Causal())
    window = SoftmaxAttention(Causal() & SlidingWindow(1024))

    def plan() -> None:
        coords = Coords.of(documents)
        work = MaskWork.under(Causal(), coords)
        made = layout.for_batch(documents, num_shards, work=work)
        style.make_metadata(everywhere, coords, made, num_shards // 2)
        HaloAttention(1024).make_metadata(window, coords, made, num_shards // 2)

    return min(_cpu_ms(plan) for _ in range(repeats))


def _cpu_ms(work: Callable[[], None]) -> float:
    start = time.process_time()
    work()
    return 1e3 * (time.process_time() - start)


def _draw(shown: dict[str, dict[str, tuple[float, float]]]) -> Figure:
    """Imbalance against keys to bring, on 64 ranks."""
    figure = Figure(figsize=(11, 3.8))
    for axes, (suite, points) in zip(figure.subplots(1, 3), shown.items(), strict=True):
        for name, (imbalance, share) in points.items():
            ours = name == "DocumentBalanced"
            axes.plot(share, imbalance, "o", color="#cc3311" if ours else "#4477aa")
            axes.annotate(name, (share, imbalance), (4, 4), textcoords="offset points", fontsize=7)
        axes.set_title(f"{suite}, 64 ranks")
        axes.set_xlabel("keys to bring, of all tokens")
        axes.set_ylabel("most work / mean work")
        axes.margins(0.25, 0.15)
    return figure


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packs", type=int, default=4, help="rows of a suite")
    parser.add_argument("--rows", type=int, default=60, help="rows of a suite on 64 ranks")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--write", default="", help="hardware name of the file under results/")
    return parser.parse_args()


if __name__ == "__main__":
    main()
