"""transformers' GatedDeltaNet layers, sharded by the seed's drop-in, equal themselves."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.testing import assert_close

from dtcp.cp_utils import CPAwareGatedDeltaNet, _AllGatherConcatFn, apply_cp
from dtcp.distributed.ledger import count_traffic
from dtcp.sequence.layout import Contiguous, HeadTail
from tests.harness import hf_qwen3_5
from tests.harness.attention_parity import refused
from tests.harness.spmd import run_ranks, spmd

LENGTHS = (9, 1, 21, 17)
SEQ_LEN, DIM = sum(LENGTHS), 24
SHAPE: dict[str, Any] = {
    "hidden_size": DIM,
    "num_hidden_layers": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 5,
    "vocab_size": 32,
}
KINDS = ("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next")


def config_of(kind: str) -> Any:
    from transformers import AutoConfig

    hf_qwen3_5.modeling(kind.removesuffix("_text"))
    return AutoConfig.for_model(kind, **SHAPE)


def layer_of(kind: str) -> CPAwareGatedDeltaNet:
    torch.manual_seed(0)
    layer = CPAwareGatedDeltaNet(config_of(kind), 0).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        layer.A_log.uniform_(-2, 1)
    return layer


class Truth(NamedTuple):
    """A layer of theirs over packed documents, one document at a time."""

    x: Tensor
    grad_out: Tensor
    out: Tensor
    grads: tuple[Tensor, ...]


def truth_of(kind: str) -> Truth:
    layer = layer_of(kind)
    x = torch.randn(1, SEQ_LEN, DIM, dtype=torch.float64, requires_grad=True)
    with hf_qwen3_5.TrueFP64():
        out = torch.cat([layer(part) for part in x.split(LENGTHS, dim=1)], dim=1)
    grad_out = torch.randn_like(out)
    grads = torch.autograd.grad(out, (x, *layer.parameters()), grad_out)
    return Truth(x.detach(), grad_out, out.detach(), grads)


@pytest.fixture(scope="module")
def truths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("delta_net")
    for kind in KINDS:
        torch.save(tuple(truth_of(kind)), folder / kind)
    return {kind: folder / kind for kind in KINDS}


def boundaries() -> Tensor:
    """Filled up as packed rows in chunks have them."""
    return nn.functional.pad(torch.tensor([0, *LENGTHS]).cumsum(0), (0, 2), value=-1000)


def restarting() -> Tensor:
    return torch.cat([torch.arange(length) for length in LENGTHS])


def compare(mesh: Any, path: Path, kind: str) -> None:
    """Every way to say which tokens these are and where documents start, both ways to go."""
    truth, layer = Truth(*torch.load(path)), layer_of(kind)
    layer._cp_mesh = mesh
    place = torch.randperm(SEQ_LEN).view(mesh.size(), -1)
    ways: list[tuple[Tensor, bool, str]] = [(place, False, "cu_seqlens")]
    for layout in (Contiguous, HeadTail):
        rows = layout(SEQ_LEN, mesh.size()).permutation().view(mesh.size(), -1)
        ways += [(rows, False, "cu_seqlens"), (rows, False, "position_ids")]
        ways += [(rows, True, "cu_seqlens")]
    for rows, relaid, documents in ways:
        layer._cp_relayout = relaid
        mine = rows[mesh.get_local_rank()]
        arguments = {"cu_seqlens": boundaries()}
        if documents == "position_ids":
            arguments = {"position_ids": restarting()[mine][None]}
        x = truth.x[:, mine].clone().requires_grad_()
        with hf_qwen3_5.TrueFP64():
            out = layer(x, seq_index=mine, **arguments)
        dx, *grads = torch.autograd.grad(out, (x, *layer.parameters()), truth.grad_out[:, mine])
        assert_close(out, truth.out[:, mine])
        assert_close(dx, truth.grads[0][:, mine])
        for grad, right in zip(grads, truth.grads[1:], strict=True):
            dist.all_reduce(grad)
            assert_close(grad, right)


@pytest.mark.parametrize("kind", KINDS)
def test_sharded_layer_equals_theirs_document_by_document(truths, kind):
    run_ranks(compare, 2, truths[kind], kind)


def test_without_a_mesh_it_is_theirs_and_documents_are_honoured_all_the_same(truths):
    truth, layer = Truth(*torch.load(truths["qwen3_next"])), layer_of("qwen3_next")
    theirs = type(layer).__mro__[2]
    with hf_qwen3_5.TrueFP64():
        assert torch.equal(layer(truth.x), theirs.forward(layer, truth.x))
        assert_close(layer(truth.x, cu_seqlens=boundaries()), truth.out)
        assert_close(layer(truth.x, position_ids=restarting()[None]), truth.out)


def adopted(mesh: Any) -> None:
    """A whole model of theirs keeps its parameters, and moves no activation head-tail."""
    module = hf_qwen3_5.modeling("qwen3_5")
    layer = module.Qwen3_5GatedDeltaNet(config_of("qwen3_5_text"), 0).double()
    names = list(layer.state_dict())
    apply_cp(nn.Sequential(layer), mesh)
    assert isinstance(layer, CPAwareGatedDeltaNet) and isinstance(
        layer, module.Qwen3_5GatedDeltaNet
    )
    assert list(layer.state_dict()) == names
    # Built as one, as NeMo's models are, or sharded before: it was no layer that apply_cp knew.
    built = layer_of("qwen3_5_moe_text")
    for each in (layer, built):
        apply_cp(nn.Sequential(each), mesh)
    assert built._cp_mesh is layer._cp_mesh is mesh
    rows = HeadTail(64, mesh.size()).token_indices(mesh.get_local_rank())
    x = torch.randn(1, len(rows), DIM, dtype=torch.float64, requires_grad=True)
    with count_traffic() as traffic:
        layer(x, seq_index=rows)
    places, states, tokens = 8 * len(rows), 2 * 4 * 6 * 11 * 8, 2 * 3 * layer.conv_dim * 8
    # Rank 0 has the start of the row, rank 1 its middle, whose halves are neighbours.
    halo = tokens // 2
    assert traffic.received == places + states + halo


def test_adopted_layer_keeps_its_parameters_and_moves_states_only():
    run_ranks(adopted, 2)


@spmd(ranks=2)
def test_all_gather_concat_sends_each_shard_its_gradient(mesh):
    """In half the bytes of an all-reduce."""
    shard = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    whole = _AllGatherConcatFn.apply(shard, mesh.get_group(), 1)
    assert whole.shape == (3, 8, 2)
    weights = torch.randn(2, 3, 8, 2, dtype=torch.float64)
    with count_traffic() as traffic:
        (grad,) = torch.autograd.grad(whole, shard, weights[mesh.get_local_rank()])
    first = 4 * mesh.get_local_rank()
    assert_close(grad, weights.sum(0)[:, first : first + 4])
    assert traffic.received == shard.numel() * 8


def undone(mesh: Any) -> None:
    layer, group = layer_of("qwen3_5_text"), mesh.get_group()
    place = HeadTail(16, 2).token_indices(mesh.get_local_rank())
    x = place.double()[None, :, None].expand(2, -1, 3)
    with count_traffic() as traffic:
        there, order = layer._undo_attention_load_balancing(x, place, group)
    assert torch.equal(there[0, :, 0], torch.arange(8.0).double() + 8 * mesh.get_local_rank())
    assert torch.equal(order, torch.arange(16))
    # Half of a shard changes its owner, in one all-to-all.
    assert traffic["dtcp::exchange_tokens"].received == 4 * 2 * 3 * 8
    back = layer._redo_attention_load_balancing(there, place, order, group)
    assert torch.equal(back, x)
    whole = layer._all_gather_concat(x.requires_grad_(), group, dim=-2)
    assert whole.shape == (2, 16, 3) and not whole.requires_grad


def test_load_balancing_is_undone_and_redone_in_one_exchange_each():
    run_ranks(undone, 2)


def refusing(mesh: Any) -> None:
    layer = layer_of("qwen3_5_text")
    layer._cp_mesh = mesh
    x, place = torch.randn(1, 8, DIM).double(), HeadTail(16, 2).token_indices(mesh.get_local_rank())

    def call(x: Tensor = x, **arguments: Any) -> Callable[[], Tensor]:
        return lambda: layer(x, **arguments)

    for name in ("cache_params", "cache"):
        refused("use_cache=False", call(**{name: object()}, seq_index=place))
    refused("neither seq_index nor position_ids", call())
    refused("indices 0 to 15", call(position_ids=torch.arange(8)[None]))
    refused("as bshd or thd", call(seq_index=place, qkv_format="sbhd"))
    refused("one value per local token", call(seq_index=place, attention_mask=torch.ones(1, 16)))
    two = x.expand(2, -1, -1)
    refused("one packed row", call(two, seq_index=place, cu_seqlens=torch.tensor([0, 16])))
    chunks, late = torch.tensor([[0, 8], [0, 16]]), torch.tensor([4, 16])
    refused("one packed row", call(seq_index=place, cu_seqlens=chunks))
    refused("starts at 0", call(seq_index=place, cu_seqlens=late), RuntimeError)
    short = torch.arange(2) + 2 * mesh.get_local_rank()
    refused("got seq_idx in layer 0", call(x, seq_index=torch.arange(4), seq_idx=x))
    refused("segment_len=2", call(x[:, :2], seq_index=short))
    refused("without one", lambda: apply_cp(nn.Linear(2, 2), mesh))
    refused("takes over one of", lambda: CPAwareGatedDeltaNet.adopt(nn.Linear(2, 2)), TypeError)


def test_what_cannot_be_honoured_is_refused():
    run_ranks(refusing, 2)
