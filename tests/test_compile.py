"""What is compiled, how often, and that it lives.

Ops count themselves: a dispatch mode would make dynamo run eager, and a dead collective pass.
"""

import random
from itertools import product

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch._dynamo.backends.common import aot_autograd

from dtcp.batch import shard_batch
from dtcp.compile import ISLAND, EagerIsland, InGraph, count_graphs
from dtcp.distributed.ledger import count_traffic
from dtcp.distributed.mesh import ParallelMesh
from dtcp.distributed.ops import selective_checkpoint_save_ops
from dtcp.mixer_plan import apply_plan
from dtcp.parallelize import Compile
from dtcp.pretrain.compiler import missing_for_inductor
from dtcp.sequence.block_balanced import BlockBalanced
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import Contiguous, HeadTail
from dtcp.sequence.masks import Causal, SlidingWindow
from dtcp.sequence.per_document import PerDocument
from dtcp.softmax import RingAttention
from dtcp.softmax.inputs import AttentionInputs
from dtcp.softmax.mixer import SoftmaxAttention
from tests.harness import packings
from tests.harness.attention_parity import (
    WINDOW,
    Block,
    Case,
    accepts,
    assert_equals_one_device,
    local_inputs,
    mixer_on,
    run,
    shard_case,
    styles,
)
from tests.harness.spmd import spmd

SEQ_LEN, BATCHES = 64, 6
boundaries = pytest.mark.parametrize("boundary", [InGraph(), EagerIsland()])


class Layers(nn.Module):
    """Two attentions with per-token parts around them."""

    def __init__(self):
        super().__init__()
        self.first = SoftmaxAttention(Causal() & SlidingWindow(7))
        self.second = SoftmaxAttention(Causal() & SlidingWindow(7))

    def forward(self, x, attn_metadata):
        x = x + self.first(x.sin(), x, x.cos(), attn_metadata)
        return x + self.second(x.sin(), x, x.cos(), attn_metadata)


def random_documents(batch: int, rng: random.Random) -> Documents:
    """Rows cut at random, some with padding."""
    rows = []
    for _ in range(batch):
        cuts = sorted(rng.sample(range(1, SEQ_LEN + 1), rng.randrange(1, 6)))
        rows.append(tuple(b - a for a, b in zip([0, *cuts], cuts, strict=False)))
    return Documents(tuple(rows), SEQ_LEN)


def batch_of(documents: Documents) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.zeros(documents.batch, SEQ_LEN, dtype=torch.int64)}


def run_batches(step, model, mesh, layout, batches=BATCHES):
    """Forward and backward over batches that all have other documents."""
    rng = random.Random(0)
    rows = 1 if layout in (PerDocument, BlockBalanced) else 2
    for _ in range(batches):
        documents = random_documents(rows, rng)
        whole = ParallelMesh.from_device_mesh(mesh)
        sharded = shard_batch(batch_of(documents), whole, layout, model=model, documents=documents)[
            1
        ]
        x = torch.randn(rows, sharded.layout.shard_len, 4, 8, requires_grad=True)
        step(x, sharded.attn_metadata).sum().backward()


@pytest.mark.slow_where(lambda layout: layout is not HeadTail)
@pytest.mark.parametrize("layout", [Contiguous, HeadTail, PerDocument, BlockBalanced])
@spmd(ranks=2)
def test_batches_of_other_documents_make_at_most_one_recompile(mesh, layout):
    """Under fullgraph, so without a break; what the ranks exchange changes with every batch."""
    for style in styles(2):
        if layout not in style.layouts:
            continue
        torch._dynamo.reset()
        model = apply_plan(Layers(), mesh, {"*": style})
        step = torch.compile(model, backend="aot_eager", fullgraph=True)
        with count_graphs() as graphs, count_traffic() as traffic:
            run_batches(step, model, mesh, layout)
        assert graphs.breaks == 0 and 1 <= graphs.graphs <= 2, f"{graphs} with {style}"
        assert traffic[f"dtcp::{style.op.name}"].calls == 2 * BATCHES
        assert traffic[f"dtcp::{style.op.name}_backward"].calls == 2 * BATCHES


@spmd(ranks=2)
def test_island_is_exactly_one_break_an_attention(mesh):
    """And three graphs, with the per-token parts in them; batches make no more."""
    for style in styles(2, boundary=EagerIsland()):
        torch._dynamo.reset()
        model = apply_plan(Layers(), mesh, {"*": style})
        step = torch.compile(model, backend="aot_eager")
        with count_graphs() as graphs, count_traffic() as traffic:
            run_batches(step, model, mesh, HeadTail)
        assert (graphs.breaks, graphs.graphs) == (2, 3), f"{graphs} with {style}"
        assert traffic[ISLAND].calls == traffic[f"dtcp::{style.op.name}"].calls == 2 * BATCHES


@spmd(ranks=2)
def test_nothing_is_counted_that_does_not_run(mesh):
    """Tracing does not count, and every execution does."""
    model = apply_plan(Layers(), mesh, {"*": RingAttention()})
    step = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        with count_traffic() as traffic:
            run_batches(step, model, mesh, HeadTail, batches=1)
        calls = {op: counted.calls for op, counted in traffic.by_op.items()}
        assert calls == {"dtcp::ring_attention": 2, "dtcp::ring_attention_backward": 2}


@pytest.mark.skipif(bool(missing_for_inductor()), reason=f"lacks {missing_for_inductor()}")
@pytest.mark.slow_where(lambda boundary: isinstance(boundary, EagerIsland))
@boundaries
@spmd(ranks=2)
def test_inductor_keeps_attention_exact_and_alive(mesh, boundary):
    mixer = mixer_on(mesh, RingAttention(boundary=boundary), WINDOW.mask)
    attend = torch.compile(Block(mixer), fullgraph=isinstance(boundary, InGraph))
    for packing in (packings.across_borders, packings.one_document):
        with count_traffic() as traffic:
            assert_equals_one_device(Case(WINDOW, packing), attend, mixer, mesh, Contiguous)
        assert traffic["dtcp::ring_attention"].calls == 1
        assert traffic["dtcp::ring_attention_backward"].calls == 1
        assert traffic.received > 0


def graph_texts(mixer, mesh, layout, case):
    """The text of every forward and backward graph of a step."""
    texts = []

    def keep(graph, example_inputs):
        texts.append(graph.print_readable(print_output=False))
        return graph

    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    attend = torch.compile(Block(mixer), backend=backend, fullgraph=True)
    sharded = shard_case(case, mixer, mesh, layout)
    run(case, attend, sharded, local_inputs(case, sharded))
    # A group has a name of its own wherever the axis is split into several.
    for index, name in enumerate(mixer.groups):
        texts = [text.replace(f"'{name}'", f"'group {index}'") for text in texts]
    return texts


@pytest.mark.slow
@pytest.mark.parametrize("layout", [Contiguous, PerDocument])
@spmd(ranks=4)
def test_all_ranks_have_the_same_graphs(mesh, layout):
    """To the letter, though no two of them need the same keys."""
    for style in styles(4):
        case = Case(WINDOW, packings.one_token_documents, seq_len=SEQ_LEN)
        if not accepts(style, layout, case, 4):
            continue
        torch._dynamo.reset()
        mixer = mixer_on(mesh, style, WINDOW.mask)
        texts = graph_texts(mixer, mesh, layout, case)
        everyones = [None] * 4
        dist.all_gather_object(everyones, texts)
        assert len(texts) == 2 and all(other == texts for other in everyones), f"{style}"
        assert texts[0].count(f"dtcp.{style.op.name}.default") == 1
        assert texts[1].count(f"dtcp.{style.op.name}_backward.default") == 1


@spmd(axes={"cp": 2, "tp": 2})
def test_all_ranks_of_an_axis_have_the_same_graphs(mesh):
    """With heads on another axis too."""
    mixer = mixer_on(mesh, RingAttention(), WINDOW.mask)
    texts = graph_texts(mixer, mesh, Contiguous, Case(WINDOW, heads=4, kv_heads=2))
    everyones = [None] * 4
    dist.all_gather_object(everyones, texts)
    assert all(other == texts for other in everyones)


@spmd(ranks=2)
def test_ops_keep_the_contract_of_torch_library(mesh):
    """Schema, fake against real, autograd registration, and AOT dispatch, of every strategy."""
    case = Case(WINDOW, seq_len=32)
    for style in styles(2):
        mixer = mixer_on(mesh, style, WINDOW.mask)
        sharded = shard_case(case, mixer, mesh, Contiguous)
        q, k, v, sink = local_inputs(case, sharded)
        metadata = sharded.attn_metadata[mixer.metadata_key].tensors()
        x = AttentionInputs(q, k, v, sink)
        args = (*x, metadata, 0.3, 0.0, mixer.groups, mixer.group_sizes, "auto", False, False)
        torch.library.opcheck(style.op.forward, args)


@spmd(ranks=1)
def test_selective_policy_knows_every_op_that_communicates(mesh):
    names = {op.name() for op in selective_checkpoint_save_ops()}
    assert {f"dtcp::{style.op.name}" for style in styles(1)} <= names
    assert {"dtcp::all_gather", "dtcp::exchange_tokens", "dtcp::causal_sdpa"} <= names
    assert {"dtcp::gated_delta_rule", "dtcp::left_halo", "dtcp::bring_left"} <= names
    assert "dtcp::gather_shared_kv" in names
    assert not any("backward" in name for name in names)


def test_selective_policy_computes_again_what_one_device_can():
    """And nothing else: whoever communicates has the name of a process group."""
    ours = {getattr(torch.ops.dtcp, name).default for name in torch.ops.dtcp}
    forward = {op for op in ours if not op.name().endswith("_backward")}
    local = forward.difference(selective_checkpoint_save_ops())
    names = {op.name() for op in local}
    assert {"dtcp::attention", "dtcp::grouped_linear", "dtcp::select_entries"} <= names
    assert "dtcp::sparse_attention" in names
    talking = {op.name() for op in local if {"group", "groups"} & arguments(op)}
    # One schema for every strategy; that of one device gets no groups.
    assert talking == {"dtcp::attention"}


def arguments(op):
    return {argument.name for argument in op._schema.arguments}


@spmd(ranks=4)
def test_metadata_have_one_shape_whatever_ranks_need(mesh):
    """So that no batch and no mask makes a graph of its own."""
    documents = (Documents.single(1, SEQ_LEN), packings.one_token_documents(SEQ_LEN, 4))
    whole, shapes = ParallelMesh.from_device_mesh(mesh), set()
    for mask, packed in product((Causal(), Causal() & SlidingWindow(3)), documents):
        mixer = mixer_on(mesh, RingAttention(), mask)
        sharded = shard_batch(batch_of(packed), whole, HeadTail, model=mixer, documents=packed)[1]
        metadata = sharded.attn_metadata[mixer.metadata_key]
        shapes.add(tuple(x.shape for x in metadata.tensors()))
    everyones = [None] * 4
    dist.all_gather_object(everyones, shapes)
    assert len(set().union(*everyones)) == 1


class OfWidth(nn.Module):
    """One function to dynamo, another graph for each width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x):
        return self.linear(x).sum()


@pytest.mark.parametrize("kind", ["whole", "around_islands"])
def test_sizes_that_are_symbols_make_one_graph(kind):
    """Where they are constants, one each, or around islands a second one."""
    for dynamic, made in ((True, 1), (False, 4 if kind == "whole" else 2)):
        torch._dynamo.reset()
        call = getattr(Compile("eager", dynamic=dynamic), kind)(OfWidth(3).forward)
        with count_graphs() as graphs:
            for rows in (2, 5, 7, 11):
                assert call(torch.ones(rows, 3)).isfinite()
        assert graphs.graphs == made


@pytest.mark.parametrize("dynamic", [False, True])
def test_one_graph_too_many_names_a_remedy_that_is_not_taken_yet(dynamic):
    torch._dynamo.reset()
    call = Compile("eager", max_graphs=1, dynamic=dynamic).whole(OfWidth(3).forward)
    call(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"max_graphs=1, got \(1, 3\) after .*: pad") as error:
        call(torch.ones(1, 3))  # a size that is no symbol
    assert ("dynamic=True" in str(error.value)) is not dynamic


@pytest.mark.parametrize("compiled", [Compile("eager").whole, Compile("eager").around_islands])
def test_a_model_may_have_more_kinds_of_blocks_than_dynamo_allows_graphs(compiled):
    """Nine, to train and to validate; torch stops at eight, or goes on in eager mode."""
    blocks = [OfWidth(width) for width in range(1, 10)]
    calls = [compiled(block.forward) for block in blocks]
    with count_graphs() as graphs:
        for _ in range(2):
            for block, call in zip(blocks, calls, strict=True):
                x = torch.ones(2, block.linear.in_features)
                call(x)
                with torch.no_grad():
                    call(x)
    assert graphs.graphs == 18
