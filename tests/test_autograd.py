"""What is asked of autograd besides one backward pass is right through mixers, or refused."""

import pytest
import torch
from torch import nn
from torch.autograd.forward_ad import dual_level, make_dual
from torch.distributed.tensor import DTensor, Shard

from dtcp.batch import shard_batch
from dtcp.distributed.mesh import ParallelMesh
from dtcp.mixer_plan import apply_plan
from dtcp.recurrent import GatedDeltaCP, GatedDeltaRule, GatedLinearAttention, GatedLinearCP
from dtcp.sequence.masks import Causal
from dtcp.softmax import HybridAttention, RingAttention, UlyssesAttention
from dtcp.softmax.mixer import SoftmaxAttention
from tests.harness.spmd import spmd


@spmd(ranks=2)
def test_writing_to_what_dtensors_are_made_of_is_refused(mesh):
    """By mixers that hand them to an op as they are; of views of one, too."""
    model = nn.ModuleDict(
        {
            "rule": GatedDeltaRule(normalize=False),
            "linear": GatedLinearAttention(),
            "attention": SoftmaxAttention(Causal()),
        }
    )
    styles = {"rule": GatedDeltaCP(), "linear": GatedLinearCP(), "attention": RingAttention()}
    apply_plan(model, mesh, styles)
    rows = {"inputs_embeds": torch.zeros(1, 16, 1)}
    _, sharded = shard_batch(rows, ParallelMesh.of_sequence(mesh), model=model)

    def mixed(name, written):
        """A DTensor made of one local tensor that is written to, and the rest of the mixer's."""
        leaf = torch.randn(1, 8, 3, 2, 4, dtype=torch.float64, requires_grad=True)
        local = 1 * leaf
        whole = DTensor.from_local(local, mesh, (Shard(1),))
        q, k, v = (x.clone() for x in whole.unbind(2))
        if name == "attention":
            inputs = whole.unbind(2)
        else:
            inputs = [q, k, v, DTensor.from_local(local[:, :, 0, :, 0], mesh, (Shard(1),))]
            inputs += [v[..., 1]] if name == "rule" else []
        loss = model[name](*inputs, sharded.attn_metadata).to_local().sum()
        if written:
            with torch.no_grad():
                local.mul_(3)
        return torch.autograd.grad(loss, leaf)

    for name in model:
        mixed(name, False)
        with pytest.raises(RuntimeError, match=f"inplace operation: [qg] of dtcp::.*{name}"):
            mixed(name, True)


def attention_on(mesh, style):
    """Causal attention to 16 tokens on ranks, and the metadata of its batch."""
    model = nn.Sequential(SoftmaxAttention(Causal()))
    apply_plan(model, mesh, {"0": style})
    rows = {"inputs_embeds": torch.zeros(1, 16, 1)}
    _, sharded = shard_batch(rows, ParallelMesh.of_sequence(mesh), model=model)
    return model[0], sharded.attn_metadata


@spmd(ranks=2)
def test_writing_to_what_backward_reads_is_refused_in_a_graph(mesh):
    """Its backward read what had been written since."""
    attention, metadata = attention_on(mesh, RingAttention())

    def attend(x):
        q = 2 * x
        out = attention(q, x, x, metadata)
        return out.sum() + q.mul_(3).sum()

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match="inplace operation: q of dtcp::ring_attention"):
        compiled(torch.randn(1, 8, 2, 4, requires_grad=True))


@spmd(ranks=2)
def test_transforms_and_forward_mode_of_attention_on_shards_are_refused_in_a_sentence(mesh):
    """A DTensor is made first, at which torch stops with an error of its own."""
    attention, metadata = attention_on(mesh, RingAttention())
    x, sink = torch.randn(1, 8, 2, 4), torch.zeros(2)

    def attend(sink):
        return attention(x, x, x, metadata, sink=sink).sum()

    with pytest.raises(NotImplementedError, match=r"no part in transforms of torch\.func"):
        torch.func.grad(attend)(sink)
    with dual_level(), pytest.raises(NotImplementedError, match="got a dual tensor"):
        attend(make_dual(sink, sink + 1))


@spmd(ranks=2)
def test_second_derivatives_of_attention_by_heads_are_refused(mesh):
    """Ulysses keeps q, k and v by heads: gradients seemed to be constants, and a penalty of them
    trained nothing.
    """
    for style in (UlyssesAttention(), HybridAttention(inner_ranks=2)):
        attention, metadata = attention_on(mesh, style)
        x = torch.randn(1, 8, 2, 4, requires_grad=True)
        loss = attention(x, x, x, metadata).sum()
        with pytest.raises(NotImplementedError, match="differentiate once"):
            torch.autograd.grad(loss, x, create_graph=True)


class NoGradient(torch.autograd.Function):
    """What is read and gives no gradient back."""

    @staticmethod
    def forward(ctx, x):
        return x.detach().sum()

    @staticmethod
    def backward(ctx, grad):
        return None


@spmd(ranks=2)
def test_an_output_without_a_gradient_is_one_of_zeros(mesh):
    model = nn.ModuleDict(
        {
            "ring": SoftmaxAttention(Causal()),
            "heads": SoftmaxAttention(Causal()),
            "linear": GatedLinearAttention(),
        }
    )
    styles = {"ring": RingAttention(), "heads": UlyssesAttention(), "linear": GatedLinearCP()}
    apply_plan(model, mesh, styles)
    rows = {"inputs_embeds": torch.zeros(1, 16, 1)}
    _, sharded = shard_batch(rows, ParallelMesh.of_sequence(mesh), model=model)
    for name, mixer in model.items():
        x = torch.randn(1, 8, 2, 4, requires_grad=True)
        placed = DTensor.from_local(x, mesh, (Shard(1),))
        inputs = [placed, placed, placed, -placed[..., 0].abs()] if name == "linear" else [x] * 3
        out = mixer(*inputs, sharded.attn_metadata)
        NoGradient.apply(out.to_local() if name == "linear" else out).backward()
        assert torch.equal(x.grad, torch.zeros_like(x))
