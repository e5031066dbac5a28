"""What ranks of a strategy compute, one rank after another on one card.

No rank talks to another here: the keys that a rank would have received are taken from the whole
row. Right: out, lse and gradients of all ranks together are those of one device. Fast: the slowest
rank's time, times the ranks, against the whole row's.
"""

from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.gpu.errors import errors_by_name, relative_error, within, worst
from benchmarks.gpu.kernels import BOUND
from benchmarks.gpu.other_kernels import summary_overhead
from benchmarks.gpu.problems import MASKS, Case, Heads, Problem, image_blocks, problem_of
from benchmarks.gpu.timing import seconds_of
from dtcp.kernels.softmax.api import (
    GradAccumulators,
    Keys,
    OnlineSoftmax,
    Queries,
    SavedForward,
    SoftmaxParams,
    attend,
    attend_backward,
)
from dtcp.kernels.softmax.reference import ReferenceAttention
from dtcp.mixer_metadata import batch_metadata
from dtcp.models.llama import PRESETS
from dtcp.models.llama.model import Block
from dtcp.sequence.block_balanced import BlockBalanced
from dtcp.sequence.coords import Coords
from dtcp.sequence.documents import Documents
from dtcp.sequence.key_intervals import KeyIntervals
from dtcp.sequence.layout import Contiguous, HeadTail, SequenceLayout
from dtcp.sequence.masks import Causal
from dtcp.sequence.per_document import PerDocument
from dtcp.softmax import AllGatherAttention, HaloAttention, RingAttention
from dtcp.softmax.mixer import SoftmaxAttention
from dtcp.softmax.moves import AttentionShape
from dtcp.softmax.style import AttentionStyle

HEADS = Heads(32, 8, 128)
SMALL = Heads(4, 2, 128)
ONE_CALL = 1.1
"""Times the error of one device that one call over gathered keys may have."""
LAYOUTS = (Contiguous, HeadTail, PerDocument, BlockBalanced)
STRATEGIES: tuple[tuple[str, AttentionStyle], ...] = (
    ("ring", RingAttention()),
    ("all-gather", AllGatherAttention()),
)


def right_cases(device: str, length: int = 4096) -> list[Case]:
    """Strategies in their layouts on 2 and 4 ranks, against one device."""
    found = [
        (name, style, layout, mask, ranks)
        for name, style in STRATEGIES
        for layout in LAYOUTS
        for mask in ("causal", "documents", "images")
        for ranks in (2, 4)
    ]
    found += [
        ("halo", HaloAttention(1024), layout, "window", ranks)
        for layout in (Contiguous, HeadTail)
        for ranks in (2, 4)
    ]
    return [
        Case(
            f"{name} {layout.__name__} {mask} {ranks} ranks",
            _right(style, layout, mask, ranks, device, length),
        )
        for name, style, layout, mask, ranks in found
    ]


def _right(
    style: AttentionStyle,
    layout: type[SequenceLayout],
    mask: str,
    ranks: int,
    device: str,
    length: int,
) -> Any:
    def run() -> dict[str, Any]:
        rule, documents = MASKS[mask](length)
        intervals = rule.intervals(Coords.of(documents, block=image_blocks(length)))
        whole = problem_of(intervals, torch.arange(length), SMALL, device)
        shards, params = layout.for_batch(documents, ranks), SoftmaxParams(SMALL.width**-0.5)
        results = [
            _rank_results(style, shards, rank, intervals, whole, params) for rank in range(ranks)
        ]
        out, lse, grad_out, dq = (
            torch.cat(x, dim=1) for x in zip(*(r[:4] for r in results), strict=True)
        )
        dk, dv = (sum(x) for x in zip(*(r[4:] for r in results), strict=True))
        order = shards.permutation().to(device)
        wide = whole.to(torch.float64)
        truth, state = ReferenceAttention(), OnlineSoftmax.empty(wide.queries.q, SMALL.width)
        truth.attend(state, wide.queries, wide.keys, params)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(length, device=device))
        saved = SavedForward(grad_out[:, back].double(), state.out, state.lse)
        sums = GradAccumulators(*(torch.zeros_like(x) for x in (wide.queries.q, *wide.keys[:2])))
        truth.attend_backward(sums, saved, wide.queries, wide.keys, params)
        # Gradients leave an op in the model's dtype.
        dq, dk, dv = (x.to(out.dtype) for x in (dq, dk, dv))
        ours = (out[:, back], lse[:, back], dq[:, back], dk, dv)
        names = ("out", "lse", "dq", "dk", "dv")
        errors = errors_by_name(names, ours, (*state, *sums))
        of_queries, of_keys = _against_one_device(errors, whole, saved, (*state, *sums), params)
        once = not isinstance(style, RingAttention)
        right = within(errors, BOUND) and (not once or of_queries <= ONE_CALL)
        return {**errors, "of_one": of_queries, "dk_of_one": of_keys, "right": right}

    return run


def _against_one_device(
    errors: dict[str, float],
    whole: Problem,
    saved: SavedForward,
    truth: tuple[torch.Tensor, ...],
    params: SoftmaxParams,
) -> tuple[float, float]:
    """The larger error of out and dq, and of dk and dv, as times that of one device's call.

    Each rank that read a key rounds its share of the key's gradient, whatever the strategy.
    """
    grad_out = saved.grad_out.to(whole.queries.q.dtype)
    out, lse = whole.forward(params)
    grads = whole.backward(SavedForward(grad_out, out, lse), params)
    dtype = whole.queries.q.dtype
    alone = {
        name: relative_error(a.to(dtype), b)
        for name, a, b in zip(
            ("out", "dq", "dk", "dv"), (out, *grads), truth[:1] + truth[2:], strict=True
        )
    }
    times = {name: errors[name] / alone[name] for name in alone}
    return worst((times["out"], times["dq"])), worst((times["dk"], times["dv"]))


def _parts(
    style: AttentionStyle,
    layout: SequenceLayout,
    rank: int,
    intervals: tuple[torch.Tensor, torch.Tensor],
    whole: Problem,
) -> Iterator[Problem]:
    """What a rank attends to, step after step, with the keys it would have received."""
    metadata = style.rank_metadata(layout, rank, KeyIntervals.read_off(*intervals))
    device = whole.queries.q.device
    mine = layout.token_indices(rank).to(device)
    queries = Queries.of(
        whole.queries.q[:, mine], metadata.first_key.to(device), metadata.last_key.to(device)
    )
    tables = (metadata.key_token_index, metadata.key_counts, metadata.block_ranges)
    for index, count, ranges, pieces in zip(*tables, metadata.pieces, strict=True):
        held = index[:count].to(device)
        keys = Keys(whole.keys.k[:, held], whole.keys.v[:, held], held, ranges, pieces)
        yield Problem(queries, keys, 0)


def _rank_results(
    style: AttentionStyle,
    layout: SequenceLayout,
    rank: int,
    intervals: tuple[torch.Tensor, torch.Tensor],
    whole: Problem,
    params: SoftmaxParams,
) -> tuple[torch.Tensor, ...]:
    """out, lse, grad_out and dq of this rank's queries, and dk and dv of the whole row."""
    parts = list(_parts(style, layout, rank, intervals, whole))
    q, (k, v) = parts[0].queries.q, whole.keys[:2]
    state = OnlineSoftmax.empty(q, v.shape[-1])
    for part in parts:
        attend(state, part.queries, part.keys, params)
    out, lse = state.finish(None, q.dtype)
    generator = torch.Generator(q.device).manual_seed(1 + rank)
    grad_out = torch.randn(out.shape, device=q.device, generator=generator).to(q.dtype)
    saved = SavedForward(grad_out, out, lse)
    dq, dk, dv = (torch.zeros(x.shape, device=x.device) for x in (q, k, v))
    for part in parts:
        buffers = (torch.zeros(x.shape, device=x.device) for x in part.keys[:2])
        grads = GradAccumulators(dq, *buffers)
        attend_backward(grads, saved, part.queries, part.keys, params)
        index = part.keys.token_index.long()
        dk.index_add_(1, index, grads.dk)
        dv.index_add_(1, index, grads.dv)
    return out, lse, grad_out, dq, dk, dv


def balance_cases(device: str, length: int = 131_072) -> list[Case]:
    """The slowest rank of 8 and of 64, by layout; and the memory of a rank of 8 at 1M tokens."""
    found = [
        Case(
            f"{mask} {layout.__name__} {ranks} ranks", _slowest(layout, mask, ranks, device, length)
        )
        for mask in ("causal", "documents")
        for layout in LAYOUTS
        for ranks in (8, 64)
    ]
    memory = [
        Case("memory of a block at 1M tokens, cp 8", _block_memory(device, 8 * length)),
        Case("memory of attention at 1M tokens, cp 8", _memory(device, 8 * length)),
    ]
    # Last: candidates that an earlier stage had no time to compile would take all of this one.
    rest = [Case("delta rule's summaries, 131072 tokens", summary_overhead)]
    return [*found[:2], *memory, *found[2:], *(rest if device == "cuda" else [])]


def _slowest(layout: type[SequenceLayout], mask: str, ranks: int, device: str, length: int) -> Any:
    def run() -> dict[str, Any]:
        rule, documents = MASKS[mask](length)
        intervals = rule.intervals(Coords.of(documents, block=image_blocks(length)))
        whole = problem_of(intervals, torch.arange(length), HEADS, device)
        params = SoftmaxParams(HEADS.width**-0.5)
        shards, style = layout.for_batch(documents, ranks), AllGatherAttention()
        took = seconds_of(lambda: whole.forward(params), whole.queries.q.device)
        # Of 64 ranks, every eighth and the last: neighbours have nearly the same work.
        measured = sorted({*range(0, ranks, max(1, ranks // 8)), ranks - 1})
        times = []
        for rank in measured:
            (part,) = _parts(style, shards, rank, intervals, whole)
            call = _forward(part, params)
            times.append(seconds_of(call, whole.queries.q.device))
        return {
            "whole_ms": 1e3 * took,
            "slowest_ms": 1e3 * max(times),
            "efficiency": took / (ranks * max(times)),
        }

    return run


def _forward(part: Problem, params: SoftmaxParams) -> Any:
    return lambda: part.forward(params)


def _block_memory(device: str, length: int, ranks: int = 8) -> Any:
    """The peak of a Llama 8B's block, forward and backward, on one rank's tokens.

    Measured with the rank's own keys; what an exchange of all keys holds beside is its formula's.
    """

    def run() -> dict[str, Any]:
        local = length // ranks
        with torch.device(device):
            block = Block(PRESETS["llama3.1-8b"]).bfloat16()
        documents = Documents.single(1, local)
        metadata = batch_metadata(block, documents).to(device)
        position_ids = documents.position_ids().to(device)
        x = torch.randn(1, local, 4096, device=device, dtype=torch.bfloat16, requires_grad=True)
        torch.cuda.reset_peak_memory_stats()
        out = block(x, position_ids, metadata)
        out.backward(torch.ones_like(out))
        peak = torch.cuda.max_memory_allocated() / 1e9
        shape = AttentionShape(1, HEADS.queries, HEADS.keys, HEADS.width, HEADS.width, 2)
        coords = Coords.of(Documents.single(1, length))
        mixer, layout = SoftmaxAttention(Causal()), HeadTail(length, ranks)
        moves = AllGatherAttention().moves(mixer, coords, layout, ranks - 1, shape)
        held = max(moves.forward.workspace, moves.backward.workspace) / 1e9
        return {"block_GB": peak, "exchange_GB": held, "right": peak + held <= 60}

    return run


def _memory(device: str, length: int) -> Any:
    """The peak of one attention, forward and backward, of the last rank of 8."""

    def run() -> dict[str, Any]:
        intervals = MASKS["causal"](length)[0].intervals(Coords.of(MASKS["causal"](length)[1]))
        mine = HeadTail(length, 8).token_indices(7)
        own = tuple(x[:, mine] for x in intervals)
        torch.cuda.reset_peak_memory_stats()
        problem = problem_of((own[0], own[1]), torch.arange(length), HEADS, device)
        params = SoftmaxParams(HEADS.width**-0.5)
        out, lse = problem.forward(params)
        problem.backward(SavedForward(torch.randn_like(out), out, lse), params)
        return {"peak_GB": torch.cuda.max_memory_allocated() / 1e9}

    return run
