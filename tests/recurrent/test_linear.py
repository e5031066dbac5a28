"""Mamba-2, lightning and gated linear attention on ranks, held against the recurrence in fp64."""

import functools
from itertools import product
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.testing import assert_close

from dtcp.batch import shard_batch
from dtcp.compile import EagerIsland, count_graphs
from dtcp.distributed.ledger import count_traffic
from dtcp.distributed.mesh import ParallelMesh
from dtcp.mixer_metadata import batch_metadata
from dtcp.recurrent import (
    GatedDeltaCP,
    GatedLinearAttention,
    GatedLinearCP,
    GatherStates,
    RelayoutCP,
    ScanStates,
)
from dtcp.recurrent.moves import LinearShape
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import Contiguous, HeadTail
from dtcp.sequence.per_document import PerDocument
from tests.harness import packings, reference
from tests.harness.attention_parity import refused
from tests.harness.spmd import spmd

G, H, K, V, SEQ_LEN = 2, 4, 6, 5, 48
KINDS = ("mamba", "lightning", "channels")
"""A decay per token and head, one per head for all tokens, one per token and key channel."""


class Truth(NamedTuple):
    inputs: tuple[Tensor, ...]  # q, k, v, g
    grad_out: Tensor
    out: Tensor
    grads: tuple[Tensor, ...]


@functools.cache
@torch.enable_grad()
def truth(documents: Documents, kind: str) -> Truth:
    draw = functools.partial(
        torch.randn, generator=torch.Generator().manual_seed(5), dtype=torch.float64
    )
    B, S = documents.batch, documents.seq_len
    g = -draw(B, S, H, K).abs() if kind == "channels" else -2 * draw(B, S, H).abs()
    if kind == "lightning":
        g = -(2.0 ** -torch.arange(1, H + 1, dtype=torch.float64)).expand(B, S, H).clone()
    else:
        # Some tokens forget all, some nothing.
        g[:, ::7], g[:, 1::5] = -40.0, 0.0
        # In a running sum such numbers leave nothing of others, or no number.
        g[:, 2::13], g[:, 4::17] = -torch.inf, -1e30
    inputs = tuple(
        x.requires_grad_() for x in (draw(B, S, G, K), draw(B, S, G, K), draw(B, S, H, V), g)
    )
    q, *rest = inputs
    out = reference.linear_attention(q * K**-0.5, *rest, documents.lengths)
    grad_out = draw(out.shape)
    grads = torch.autograd.grad(out, inputs, grad_out, materialize_grads=True)
    return Truth(tuple(x.detach() for x in inputs), grad_out, out.detach(), grads)


def claimed(mesh, style):
    mixer = GatedLinearAttention()
    parallelize_module(nn.Sequential(mixer), mesh, {"0": style})
    return mixer


def shard_case(documents, mixer, mesh, layout):
    tokens = torch.zeros(documents.batch, documents.seq_len, dtype=torch.int64)
    on = ParallelMesh.of_sequence(mesh)
    return shard_batch({"input_ids": tokens}, on, layout, model=mixer, documents=documents)[1]


def assert_equals_the_recurrence(documents, kind, attend, sharded):
    expected = truth(documents, kind)
    inputs = [sharded.shard(x).requires_grad_() for x in expected.inputs]
    with count_traffic() as forward:
        out = attend(*inputs, sharded.attn_metadata)
    with count_traffic() as backward:
        grads = torch.autograd.grad(out, inputs, sharded.shard(expected.grad_out))
    assert_close(out, sharded.shard(expected.out))
    assert_close(grads, tuple(map(sharded.shard, expected.grads)))
    return forward, backward


@pytest.mark.parametrize("kind", KINDS)
def test_mamba_on_one_device_equals_the_recurrence(kind):
    """Of more than a chunk, too, that no document heeds."""
    mixer = GatedLinearAttention()
    rows = [*(packing(SEQ_LEN, 2) for packing in packings.PACKINGS), Documents(((90, 60),), 160)]
    for documents in rows:
        expected = truth(documents, kind)
        inputs = [x.clone().requires_grad_() for x in expected.inputs]
        out = mixer(*inputs, batch_metadata(mixer, documents))
        assert_close(out, expected.out)
        assert_close(torch.autograd.grad(out, inputs, expected.grad_out), expected.grads)


@pytest.mark.slow_where(lambda ranks: ranks == 4)
@spmd(ranks=(1, 2, 3, 4))
def test_mamba_equals_the_recurrence_and_moves_the_bytes_of_its_formula(mesh, ranks):
    """Both layouts, states gathered and scanned, documents cut by every border, padding."""
    rows = (packings.across_borders, packings.last_shard_padding, packings.two_rows)
    styles = (
        GatedLinearCP(states=GatherStates()),
        GatedLinearCP(states=ScanStates()),
        GatedLinearCP(boundary=EagerIsland()),
    )
    for (i, style), (j, layout) in product(enumerate(styles), enumerate((Contiguous, HeadTail))):
        mixer = claimed(mesh, style)
        packing = rows[(i + j + ranks) % 3]
        for kind in KINDS if ranks == 2 else KINDS[:1]:
            documents = packing(SEQ_LEN, ranks)
            sharded = shard_case(documents, mixer, mesh, layout)
            moved = assert_equals_the_recurrence(documents, kind, mixer, sharded)
            shape, rank = LinearShape(documents.batch, H, K, V, 8), mesh.get_local_rank()
            planned = style.received(mixer, sharded.coords, sharded.layout, rank, shape)
            assert [x.received for x in moved] == [planned.forward, planned.backward]


@spmd(ranks=2)
def test_mamba_states_are_smaller_than_those_of_the_delta_rule(mesh):
    """K * (1 + V) numbers a head and segment, whatever the length; seen by torch's profiler."""
    mixer = claimed(mesh, GatedLinearCP())
    for seq_len in (SEQ_LEN, 4 * SEQ_LEN):
        documents = Documents(((seq_len,),), seq_len)
        sharded = shard_case(documents, mixer, mesh, HeadTail)
        q, k, v, g = (sharded.shard(x) for x in truth(documents, "mamba").inputs)
        with count_traffic() as moved, torch.profiler.profile(record_shapes=True) as profiler:
            mixer(q, k, v, g, sharded.attn_metadata)
        assert moved.received == 2 * H * K * (1 + V) * 8
        names = [event.name for event in profiler.events() if event.name.startswith("c10d::")]
        assert len([name for name in names if "gather" in name]) == 1


@spmd(ranks=2)
def test_compiled_mamba_is_one_graph_for_all_batches(mesh):
    mixer = claimed(mesh, GatedLinearCP())
    torch._dynamo.reset()
    attend = torch.compile(mixer, backend="aot_eager", fullgraph=True)
    with count_graphs() as graphs:
        for packing in (packings.across_borders, packings.one_document):
            documents = packing(SEQ_LEN, 2)
            sharded = shard_case(documents, mixer, mesh, HeadTail)
            assert_equals_the_recurrence(documents, "mamba", attend, sharded)
    assert (graphs.graphs, graphs.breaks) == (1, 0)


class Layer(nn.Module):
    """What RelayoutCP takes: a layer called with its hidden states."""

    def __init__(self):
        super().__init__()
        self.rule = GatedLinearAttention()

    def forward(self, x, attn_metadata):
        q, k, v, g = x.split((G * K, G * K, H * V, H), dim=-1)
        q, k, v = q.unflatten(-1, (G, K)), k.unflatten(-1, (G, K)), v.unflatten(-1, (H, V))
        return torch.nn.functional.pad(
            self.rule(q, k, v, g, attn_metadata).flatten(2), (0, x.shape[-1] - H * V)
        )


@spmd(ranks=2)
def test_mamba_on_a_layout_of_documents_moves_its_tokens_there_and_back(mesh):
    layer = Layer()
    root = nn.ModuleDict({"layer": layer})
    parallelize_module(root, mesh, {"layer": RelayoutCP(), "layer.rule": GatedLinearCP()})
    documents = packings.two_rows(SEQ_LEN, 2)
    expected = truth(documents, "mamba")
    sharded = shard_case(documents, root, mesh, PerDocument)
    x = torch.cat([part.flatten(2) for part in expected.inputs], dim=-1)
    local = sharded.shard(x).requires_grad_()
    out = layer(local, sharded.attn_metadata)[..., : H * V]
    grad_out = sharded.shard(expected.grad_out.flatten(2))
    (grad,) = torch.autograd.grad(out, local, grad_out)
    assert_close(out, sharded.shard(expected.out.flatten(2)))
    whole = torch.cat([part.flatten(2) for part in expected.grads], dim=-1)
    assert_close(grad, sharded.shard(whole))


class Gated(Layer):
    """A layer that reads something more of each token, or returns it."""

    returns_two = False

    def forward(self, x, attn_metadata, gate=None):
        out = super().forward(x, attn_metadata)
        return (out, gate) if self.returns_two else out


@spmd(ranks=2)
def test_a_layer_of_more_than_its_tokens_is_refused_where_tokens_move(mesh):
    """All that goes by token would have to move; it ended in an error of Python's."""
    layer = Gated()
    root = nn.ModuleDict({"layer": layer})
    parallelize_module(root, mesh, {"layer": RelayoutCP(), "layer.rule": GatedLinearCP()})
    documents = packings.two_rows(SEQ_LEN, 2)
    sharded = shard_case(documents, root, mesh, HeadTail)
    whole = torch.cat([part.flatten(2) for part in truth(documents, "mamba").inputs], dim=-1)
    x, attn_metadata = sharded.shard(whole), sharded.attn_metadata
    with pytest.raises(TypeError, match=r"got 3 by place and \[\] by name"):
        layer(x, attn_metadata, x)
    with pytest.raises(TypeError, match=r"got 2 by place and \['gate'\] by name"):
        layer(x, attn_metadata, gate=x)
    assert layer(x, attn_metadata=attn_metadata).shape == x.shape
    layer.returns_two = True
    with pytest.raises(TypeError, match="got a result of type tuple"):
        layer(x, attn_metadata)


@spmd(ranks=2)
def test_mamba_takes_dtensors_and_refuses_other_styles_and_layouts(mesh):
    mixer, documents = claimed(mesh, GatedLinearCP()), packings.across_borders(SEQ_LEN, 2)
    sharded, expected = shard_case(documents, mixer, mesh, HeadTail), truth(documents, "mamba")
    inputs = [
        DTensor.from_local(sharded.shard(x), mesh, [Shard(1)]).requires_grad_()
        for x in expected.inputs
    ]
    out = mixer(*inputs, sharded.attn_metadata)
    assert_close(out.to_local(), sharded.shard(expected.out))
    grad_out = DTensor.from_local(sharded.shard(expected.grad_out), mesh, [Shard(1)])
    for grad, whole in zip(torch.autograd.grad(out, inputs, grad_out), expected.grads, strict=True):
        assert_close(grad.to_local(), sharded.shard(whole))
    with pytest.raises(TypeError, match="takes over an unclaimed GatedDeltaRule"):
        claimed(mesh, GatedDeltaCP())
    scanned = claimed(mesh, GatedLinearCP(states=ScanStates()))
    refused("ScanStates composes", lambda: shard_case(documents, scanned, mesh, PerDocument))


def test_mamba_of_shapes_that_do_not_fit_is_refused():
    mixer, documents = GatedLinearAttention(scale=1.0), Documents.single(1, 4)
    metadata = batch_metadata(mixer, documents)
    q, v, g = torch.zeros(1, 4, 2, 3), torch.zeros(1, 4, 4, 5), torch.zeros(1, 4, 4)
    assert mixer(q, q, v, g, metadata).shape == v.shape
    for wrong in (
        (q, q[:, :3], v, g),
        (q, q, v[:, :, :3], g),
        (q, q, v, g[..., :2]),
        (q, q, v, g[..., None].expand(-1, -1, -1, 5)),
    ):
        with pytest.raises(ValueError, match="one query, key, value and decay per token and head"):
            mixer(*wrong, metadata)
    with pytest.raises(TypeError, match="one floating dtype"):
        mixer(q, q, v.double(), g, metadata)
    longer = batch_metadata(mixer, Documents.single(1, 5))
    with pytest.raises(ValueError, match="metadata of its own batch"):
        mixer(q, q, v, g, longer)
