"""Compressed sparse attention on ranks equals a brute force on one device, in fp64."""

import functools
import itertools
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor.parallel import parallelize_module
from torch.profiler import profile
from torch.testing import assert_close

from benchmarks.published_sparse import PublishedSparseCP
from dtcp.batch import shard_batch
from dtcp.compile import count_graphs
from dtcp.distributed.ledger import count_traffic
from dtcp.distributed.mesh import ParallelMesh
from dtcp.kernels.sparse import indexer, reference
from dtcp.kernels.sparse.types import SPARSE_TILE
from dtcp.mixer_metadata import batch_metadata
from dtcp.sequence.coords import Coords
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import Contiguous, HeadTail, SequenceLayout
from dtcp.sequence.per_document import PerDocument
from dtcp.sharded_batch import ShardedBatch
from dtcp.sparse import CompressedSparseCP
from dtcp.sparse.mixer import (
    CompressedSparseAttention,
    Compression,
    Index,
    Prepool,
    sparse_metadata,
)
from dtcp.sparse.moves import SparseShape
from dtcp.sparse.op import select_entries
from dtcp.sparse.style import rank_metadata, work
from tests.harness import reference as dense
from tests.harness.spmd import spmd

WINDOW, HEADS, DIM, INDEX_HEADS, INDEX_DIM = 9, 3, 8, 4, 4
NONE, HEAVY = None, Compression(8)
SPARSE = Compression(3, overlap=True, selected=4)
KINDS = [NONE, HEAVY, SPARSE]
SEQ_LEN = 48
ROWS = ((17, 2, 25), (48,))
"""Documents that shard borders and windows cut anywhere, one shorter than either; padding."""


class Inputs(NamedTuple):
    """All that a mixer of any kind reads, of whole rows; the first nine have gradients."""

    q: Tensor
    keys: Tensor
    sink: Tensor
    value: Tensor
    gate: Tensor
    bias: Tensor
    index_q: Tensor
    index_weight: Tensor
    index_value: Tensor
    index_gate: Tensor
    index_bias: Tensor


def inputs(kind: Compression | None, seq_len: int = SEQ_LEN) -> Inputs:
    """Random ones, on every rank alike."""
    generator = torch.Generator().manual_seed(3)
    halves = 2 if kind is not None and kind.overlap else 1
    ratio = 1 if kind is None else kind.ratio
    wide, narrow, B = halves * DIM, halves * INDEX_DIM, len(ROWS)
    shapes: list[tuple[int, ...]] = [(B, seq_len, HEADS, DIM), (B, seq_len, DIM), (HEADS,)]
    shapes += [(B, seq_len, wide), (B, seq_len, wide), (ratio, wide)]
    shapes += [(B, seq_len, INDEX_HEADS, INDEX_DIM), (B, seq_len, INDEX_HEADS)]
    shapes += [(B, seq_len, narrow), (B, seq_len, narrow), (ratio, narrow)]
    return Inputs(
        *(
            torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
            for shape in shapes
        )
    )


def finish(pooled: Tensor, position: Tensor) -> Tensor:
    """Something that reads both the entry and its position."""
    return torch.tanh(pooled) * (1 + 0.1 * position[..., None].to(pooled.dtype))


def run(mixer: nn.Module, x: Inputs, attn_metadata: object) -> Tensor:
    kind = mixer.compression
    tokens = None if kind is None else Prepool(x.value, x.gate, x.bias, finish)
    index = None
    if kind is not None and kind.selected is not None:
        keys = Prepool(x.index_value, x.index_gate, x.index_bias, finish)
        index = Index(x.index_q, x.index_weight, keys)
    out: Tensor = mixer(x.q, x.keys, attn_metadata, sink=x.sink, tokens=tokens, index=index)
    return out


def pooled(value: Tensor, gate: Tensor, bias: Tensor, kind: Compression) -> Tensor:
    """The entries of one document, window by window."""
    entries = []
    half = bias.shape[1] // (2 if kind.overlap else 1)
    for number in range(len(value) // kind.ratio):
        here = slice(number * kind.ratio, (number + 1) * kind.ratio)
        values, gates = [value[here][:, -half:]], [(gate[here] + bias)[:, -half:]]
        if kind.overlap and number > 0:
            before = slice((number - 1) * kind.ratio, number * kind.ratio)
            values.append(value[before][:, :half])
            gates.append((gate[before] + bias)[:, :half])
        weight = torch.cat(gates).softmax(0)
        entry = (weight * torch.cat(values)).sum(0)
        entries.append(finish(entry[None, None], torch.tensor([[number * kind.ratio]]))[0, 0])
    return torch.stack(entries) if entries else value.new_zeros(0, half)


def one_document(x: Inputs, kind: Compression | None) -> Tensor:
    """Every query by itself, from the definition; x without a batch dim."""
    out = []
    entries = index_entries = None
    if kind is not None:
        entries = pooled(x.value, x.gate, x.bias, kind)
        index_entries = pooled(x.index_value, x.index_gate, x.index_bias, kind)
    for query in range(len(x.q)):
        keys = x.keys[max(0, query - WINDOW + 1) : query + 1]
        if kind is not None and entries is not None and index_entries is not None:
            closed = (query + 1) // kind.ratio
            chosen = torch.arange(closed)
            if kind.selected is not None and closed > kind.selected:
                scores = (x.index_q[query] @ index_entries[:closed].T).relu()
                # Of equal scores, as those of entries that no head likes, the earlier wins.
                ranked = (x.index_weight[query] @ scores).sort(descending=True, stable=True)
                chosen = ranked.indices[: kind.selected]
            keys = torch.cat((keys, entries[chosen]))
        scores = torch.cat((x.q[query] @ keys.T * DIM**-0.5, x.sink[:, None]), dim=1)
        out.append(scores.softmax(1)[:, :-1] @ keys)
    return torch.stack(out)


class Truth(NamedTuple):
    inputs: Inputs
    grad: Tensor
    out: Tensor
    grads: tuple[Tensor | None, ...]


@functools.cache
def truth(kind: Compression | None, packing: tuple[tuple[int, ...], ...] = ROWS) -> Truth:
    x = inputs(kind)
    rows = []
    for row, lengths in enumerate(packing):
        one = Inputs(*(v if name in SHARED else v[row] for name, v in x._asdict().items()))
        start, parts = 0, [one.q[:0]]
        for length in lengths:
            stop = start + length
            cut = (v if n in SHARED else v[start:stop] for n, v in one._asdict().items())
            parts.append(one_document(Inputs(*cut), kind))
            start = stop
        out = torch.cat(parts)
        rows.append(nn.functional.pad(out, (0, 0, 0, 0, 0, SEQ_LEN - start)))
    out = torch.stack(rows)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=out.dtype)
    grad = grad * (Documents(packing, SEQ_LEN).document() >= 0)[..., None, None]
    return Truth(x, grad, out.detach(), torch.autograd.grad(out, x, grad, allow_unused=True))


SHARED = ("sink", "bias", "index_bias")
"""What has no sequence: whole on every rank, its gradient a sum over ranks."""


def mixer_of(kind: Compression | None) -> CompressedSparseAttention:
    return CompressedSparseAttention(WINDOW, kind, scale=DIM**-0.5)


def sharded_for(
    mixer: nn.Module,
    mesh: object,
    layout: type[SequenceLayout],
    rows: object = ROWS,
    seq_len: int = SEQ_LEN,
) -> ShardedBatch:
    batch = {"input_ids": torch.zeros(len(ROWS), seq_len, dtype=torch.int64)}
    documents = Documents(rows, seq_len)
    whole = ParallelMesh.of_sequence(mesh)
    return shard_batch(batch, whole, layout, model=mixer, documents=documents)[1]


def assert_equals_one_device(mesh, kind, style, layout, compiled, packing=ROWS):
    """Output and every gradient; returns what was communicated, forward and backward."""
    expected = truth(kind, packing)
    mixer = mixer_of(kind)
    parallelize_module(nn.Sequential(mixer), mesh, {"0": style})
    sharded = sharded_for(mixer, mesh, layout, packing)
    local = {
        name: x.detach() if name in SHARED else sharded.shard(x.detach())
        for name, x in expected.inputs._asdict().items()
    }
    mine = Inputs(**{name: x.contiguous().requires_grad_() for name, x in local.items()})
    forward = torch.compile(run, backend="aot_eager", fullgraph=True) if compiled else run
    with count_traffic() as there:
        out = forward(mixer, mine, sharded.attn_metadata)
    with count_traffic() as back:
        grads = torch.autograd.grad(out, mine, sharded.shard(expected.grad), allow_unused=True)
    assert_close(out, sharded.shard(expected.out))
    for name, actual, whole in zip(Inputs._fields, grads, expected.grads, strict=True):
        if whole is None:
            assert actual is None or not actual.any(), f"{name} has no gradient"
        elif name in SHARED:
            torch.distributed.all_reduce(actual, group=mesh.get_group())
            assert_close(actual, whole, msg=lambda text, name=name: f"{name}: {text}")
        else:
            assert_close(
                actual, sharded.shard(whole), msg=lambda text, name=name: f"{name}: {text}"
            )
    return mixer, sharded, there, back


@pytest.mark.parametrize("tile", [SPARSE_TILE, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_one_device_equals_brute_force(kind, tile, monkeypatch):
    """In one tile, and in many that are cut again since their scores would be too many."""
    expected, mixer = truth(kind), mixer_of(kind)
    attn_metadata = batch_metadata(mixer, Documents(ROWS, SEQ_LEN))
    if tile < SPARSE_TILE:
        monkeypatch.setattr(reference, "MAX_TILE_SCORES", 150)
        monkeypatch.setattr(indexer, "MAX_INDEX_SCORES", 3 * tile * INDEX_HEADS)
        coords, whole = Coords.of(Documents(ROWS, SEQ_LEN)), [[(0, SEQ_LEN)]]
        small = sparse_metadata(coords, whole, 0, WINDOW, kind, halo=False, tile=tile)
        attn_metadata = {mixer.metadata_key: small}
    out = run(mixer, expected.inputs, attn_metadata)
    assert_close(out, expected.out)
    grads = torch.autograd.grad(out, expected.inputs, expected.grad, allow_unused=True)
    assert_close(list(grads), list(expected.grads))


@pytest.mark.parametrize("layout", [Contiguous, HeadTail])
@pytest.mark.parametrize("kind", KINDS)
@spmd(ranks=(2, 3, 4))
def test_ranks_equal_brute_force_and_move_what_the_formula_says(mesh, ranks, kind, layout):
    """Halos longer than a segment too: at four ranks of HeadTail one has six tokens."""
    style = CompressedSparseCP()
    mixer, sharded, there, back = assert_equals_one_device(mesh, kind, style, layout, False)
    shape = SparseShape(len(ROWS), DIM, INDEX_DIM, 8)
    formula = style.received(mixer, sharded.coords, sharded.layout, mesh.get_local_rank(), shape)
    assert (there.received, back.received) == (formula.forward, formula.backward)
    assert collectives(there) <= 3 and collectives(back) <= 3


def collectives(traffic) -> int:
    moving = ("dtcp::all_gather", "dtcp::reduce_scatter", "dtcp::bring_left")
    return sum(n.calls for op, n in traffic.by_op.items() if op.startswith(moving))


@pytest.mark.parametrize("kind", KINDS)
@spmd(ranks=3)
def test_the_published_way_equals_brute_force(mesh, kind):
    assert_equals_one_device(mesh, kind, PublishedSparseCP(), Contiguous, False)


@pytest.mark.parametrize("kind", [HEAVY, SPARSE], ids=["D-heavy", "D-sparse"])
@spmd(ranks=2)
def test_the_published_way_gathers_entries_where_windows_do_not_overlap(mesh, kind):
    """Raw keys of all other tokens; then entries, or values and gates of all tokens to pool."""
    packing = ((16, 8, 20), (48,)) if kind == HEAVY else ROWS
    *_, there, back = assert_equals_one_device(
        mesh, kind, PublishedSparseCP(), Contiguous, False, packing
    )
    others, keys = SEQ_LEN // 2 * len(ROWS) * 8, DIM
    if kind == HEAVY:
        assert there.received == back.received == others * (keys + DIM / kind.ratio)
    else:
        pooled, index = 2 * 2 * DIM, 2 * 2 * INDEX_DIM
        assert there.received == others * (keys + pooled + index)
        assert back.received == others * (keys + pooled)


@pytest.mark.parametrize(("kind", "layout"), [(HEAVY, HeadTail), (SPARSE, Contiguous)])
@spmd(ranks=2)
def test_compiled_mixer_is_one_graph_and_equals_brute_force(mesh, kind, layout):
    with count_graphs() as graphs:
        assert_equals_one_device(mesh, kind, CompressedSparseCP(), layout, True)
    assert (graphs.graphs, graphs.breaks) == (1, 0)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [None, True])
@spmd(ranks=2)
def test_lengths_that_change_make_one_more_graph_at_most(mesh, dynamic):
    """Sizes are symbols in it, which traced checks must not spell; exact at every length."""
    plain, mixer, made = mixer_of(SPARSE), mixer_of(SPARSE), []
    parallelize_module(nn.Sequential(mixer), mesh, {"0": CompressedSparseCP()})
    forward = torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for seq_len in (48, 60, 72, 84):
        rows, x = ((11, seq_len - 17), (seq_len,)), inputs(SPARSE, seq_len)
        expected = run(plain, x, batch_metadata(plain, Documents(rows, seq_len)))
        sharded = sharded_for(mixer, mesh, HeadTail, rows, seq_len)
        local = {n: v if n in SHARED else sharded.shard(v) for n, v in x._asdict().items()}
        mine = Inputs(**{n: v.detach().requires_grad_() for n, v in local.items()})
        with count_graphs() as graphs:
            out = forward(mixer, mine, sharded.attn_metadata)
            grads = torch.autograd.grad(out.square().sum(), mine[:6])
        made.append(graphs.graphs)
        assert_close(out, sharded.shard(expected))
        whole = torch.autograd.grad(expected.square().sum(), x[:6])
        for name, actual, each in zip(Inputs._fields, grads, whole, strict=False):
            if name in SHARED:
                torch.distributed.all_reduce(actual, group=mesh.get_group())
            assert_close(actual, each if name in SHARED else sharded.shard(each))
    # Sizes that were equal when the first graph was traced are one symbol, here of 24 channels.
    assert made[0] == 1 >= made[1] and made[2:] == [0, 0], made


@spmd(ranks=2)
def test_a_compression_with_a_halo_of_one_token_works(mesh):
    """Nothing to the left at all: a window of the query alone, and entries of one token."""
    mixer = CompressedSparseAttention(1, Compression(1), scale=1.0)
    x = inputs(Compression(1))
    expected = run(mixer, x, batch_metadata(mixer, Documents(ROWS, SEQ_LEN)))
    parallelize_module(nn.Sequential(mixer), mesh, {"0": CompressedSparseCP()})
    sharded = sharded_for(mixer, mesh, HeadTail)
    mine = Inputs(**{n: v if n in SHARED else sharded.shard(v) for n, v in x._asdict().items()})
    assert_close(run(mixer, mine, sharded.attn_metadata), sharded.shard(expected))


def test_equal_scores_are_won_by_the_earlier_entry(monkeypatch):
    """However the entries are cut into tiles; what is not seen is never chosen."""
    keys = torch.tensor([1.0, 2, 2, 0, 2, 1, 2, 2])[None, :, None]
    q, weight = torch.ones(1, 3, 1, 1), torch.ones(1, 3, 1)
    closing = torch.arange(8, dtype=torch.int32)[None]
    first = torch.tensor([[0, 0, 2]], dtype=torch.int32)
    last = torch.tensor([[7, 4, 5]], dtype=torch.int32)
    tiles = torch.tensor([[[0, 3, 0, 3, 0, 8]]])
    for scores in (1, 6, 9, indexer.MAX_INDEX_SCORES):
        monkeypatch.setattr(indexer, "MAX_INDEX_SCORES", scores)
        chosen = select_entries(q, weight, keys, first, last, closing, tiles, 3)
        assert chosen.tolist() == [[[1, 2, 4], [1, 2, 4], [2, 4, 5]]]


def test_head_tail_balances_the_work():
    """One long row of 16 ranks: what the busiest rank computes over the mean."""
    documents = Documents.single(1, 16 * 1024)
    coords = Coords.of(documents)
    for kind in (Compression(4, overlap=True, selected=64), Compression(32)):
        loads = {}
        for layout in (HeadTail, Contiguous):
            placed = layout(documents.seq_len, 16)
            done = [
                work(rank_metadata(coords, placed, rank, 32, kind), selected=kind.selected)
                for rank in range(16)
            ]
            loads[layout] = [
                max(part) * len(part) / sum(part) if sum(part) else 1.0
                for part in zip(*done, strict=True)
            ]
        assert max(loads[HeadTail]) < 1.05 < max(loads[Contiguous])


@dataclass(frozen=True)
class Unknown(SequenceLayout):
    """A layout of somebody else."""

    def runs(self, rank):
        return [(rank * self.shard_len, (rank + 1) * self.shard_len)]


@pytest.mark.parametrize("kind", KINDS)
@spmd(ranks=(2, 3))
def test_pieces_of_documents_cut_one_by_one_equal_one_device(mesh, kind):
    """Rows of different documents; operands move to HeadTail and the output back."""
    style, heads = CompressedSparseCP(), {"heads": HEADS, "index_heads": INDEX_HEADS}
    shape = SparseShape(len(ROWS), DIM, INDEX_DIM, 8, **heads)
    mixer, sharded, *traffic = assert_equals_one_device(mesh, kind, style, PerDocument, False)
    moves = style.moves(mixer, sharded.coords, sharded.layout, mesh.get_local_rank(), shape)
    for moved, stated in zip(traffic, (moves.forward, moves.backward), strict=True):
        assert (moved.sent, moved.received) == (sum(stated.sent), sum(stated.received))


@spmd(ranks=2)
def test_what_cannot_be_honoured_is_refused(mesh):
    style, mixer = CompressedSparseCP(), mixer_of(SPARSE)
    with pytest.raises(ValueError, match="unclaimed CompressedSparseAttention"):
        sharded_for(mixer, mesh, Contiguous)
    with pytest.raises(TypeError, match="takes over an unclaimed"):
        parallelize_module(nn.Sequential(nn.Linear(2, 2)), mesh, {"0": style})
    parallelize_module(nn.Sequential(mixer), mesh, {"0": style})
    with pytest.raises(ValueError, match="works on the layouts Contiguous, HeadTail"):
        sharded_for(mixer, mesh, Unknown)
    with pytest.raises(ValueError, match="needs a layout of as many shards"):
        batch_metadata(mixer, Documents(ROWS, SEQ_LEN))
    with pytest.raises(ValueError, match="reads the metadata of its batch"):
        run(mixer, inputs(SPARSE), {})
    sharded = sharded_for(mixer, mesh, Contiguous)
    local = Inputs(*(sharded.shard(x) if x.ndim > 2 else x for x in inputs(SPARSE)))
    local = Inputs(*(x.float() for x in local))._replace(gate=local.gate)
    with pytest.raises(TypeError, match=r"keys of torch.float32 and tokens of torch.float64"):
        run(mixer, local, sharded.attn_metadata)


@pytest.mark.parametrize(("ratio", "selected"), [(0, None), (4, 0)])
def test_a_compression_of_nothing_is_refused(ratio, selected):
    with pytest.raises(ValueError, match="pools ratio >= 1 tokens"):
        Compression(ratio, selected=selected)


def test_a_head_without_a_sink_sees_nothing_in_padding_and_has_gradients():
    """Its sink is -inf, as the lse of a token of padding is: their difference was no number."""
    draw = functools.partial(torch.randn, dtype=torch.float64)
    q, keys, sink = draw(2, 12, HEADS, DIM), draw(2, 12, DIM), draw(HEADS)
    sink[0] = -torch.inf
    inputs = [x.requires_grad_() for x in (q, keys, sink)]
    mixer = CompressedSparseAttention(3, None, scale=0.5)
    lengths = ((5, 4), (12,))
    metadata = batch_metadata(mixer, Documents(lengths, 12))
    out = mixer(q, keys, metadata, sink=sink)
    visible = dense.visible(lengths, 12, dense.Both(dense.causal, dense.Window(3)))
    one_head = keys[:, :, None]
    expected, _ = dense.attention(q, one_head, one_head, visible, scale=0.5, sink=sink)
    assert_close(out, expected)
    grad = draw(out.shape)
    grads = [torch.autograd.grad(x, inputs, grad) for x in (out, expected)]
    assert_close(*grads)


def test_a_window_of_nothing_is_refused():
    with pytest.raises(ValueError, match="counts the query itself"):
        CompressedSparseAttention(0, None, scale=1.0)


def peak_and_largest(work_done) -> tuple[int, int]:
    """Most bytes held at once of those that the work allocates, and its largest allocation."""
    with profile(profile_memory=True) as profiler:
        work_done()
    events = profiler.profiler.kineto_results.events()
    moved = [event for event in events if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(moved, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(sizes)), max(sizes)


@pytest.mark.parametrize("kind", [Compression(4, overlap=True, selected=16), Compression(32)])
@spmd(ranks=2)
def test_nothing_of_the_size_of_a_score_table_is_made(mesh, kind):
    """Not even one byte for each of L x S pairs, forward or backward."""
    seq_len, documents = 4096, Documents(((2500, 1500), (4096,)), 4096)
    mixer = CompressedSparseAttention(32, kind, scale=1.0)
    parallelize_module(nn.Sequential(mixer), mesh, {"0": CompressedSparseCP()})
    whole = ParallelMesh.of_sequence(mesh)
    batch = {"input_ids": torch.zeros(2, seq_len, dtype=torch.int64)}
    sharded = shard_batch(batch, whole, HeadTail, model=mixer, documents=documents)[1]
    x = inputs(kind, seq_len)
    local = {n: v if n in SHARED else sharded.shard(v) for n, v in x._asdict().items()}
    mine = Inputs(**{name: v.detach().requires_grad_() for name, v in local.items()})
    _, largest = peak_and_largest(lambda: run(mixer, mine, sharded.attn_metadata).sum().backward())
    assert largest < seq_len * seq_len // 2


def test_the_indexer_of_flash_at_128k_tokens_on_eight_ranks_fits_in_two_gib():
    """A tile of its queries, the last of the row, against all entries: tiles come one by one."""
    queries, heads, dim, entries, selected = SPARSE_TILE, 64, 128, 32_768, 512
    q = torch.randn(1, queries, heads, dim, dtype=torch.bfloat16)
    weight = torch.randn(1, queries, heads, dtype=torch.bfloat16)
    keys = torch.randn(1, entries, dim, dtype=torch.bfloat16)
    closing = torch.arange(3, 4 * entries, 4, dtype=torch.int32)[None]
    last = torch.arange(4 * entries - queries, 4 * entries, dtype=torch.int32)[None]
    tiles = torch.tensor([[[0, queries, 0, queries, 0, entries]]])
    seen = (torch.zeros_like(last), last, closing, tiles, selected)
    peak, _ = peak_and_largest(lambda: select_entries(q, weight, keys, *seen))
    assert peak < 2**28
