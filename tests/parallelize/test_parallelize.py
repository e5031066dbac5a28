"""parallelize: what it promises of parameters, graphs and gradients, and what it refuses."""

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel
from torch.testing import assert_close
from torch.torch_version import TorchVersion

from dtcp.batch import shard_batch
from dtcp.compile import EagerIsland, count_graphs
from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.models.llama import Llama, LlamaConfig, tiny
from dtcp.parallelize import (
    FSDP,
    FullCheckpoint,
    NoCheckpoint,
    ParallelPlan,
    SelectiveCheckpoint,
    llama_plan,
    parallelize,
)
from dtcp.parallelize.tensor_parallel import reduce_from_region
from dtcp.recurrent import CausalConv1d, CausalConvCP
from dtcp.sequence.layout import HeadTail
from dtcp.softmax import RingAttention
from tests.harness import parity
from tests.harness.parity import GRAPHS, ROWS, gradients, on_mesh, one_device
from tests.harness.spmd import spmd

CONFIG = replace(parity.CONFIG, num_layers=2)


def a_pair(
    degrees: Degrees, config: LlamaConfig = CONFIG, dtype: torch.dtype = torch.float64, **options
) -> tuple[Llama, nn.Module, ParallelMesh]:
    """A model, the same one parallel, and its mesh."""
    reference, model = Llama(config).to(dtype), Llama(config).to(dtype)
    model.load_state_dict(reference.state_dict())
    mesh = ParallelMesh.from_degrees(degrees, "cpu")
    attention = options.pop("attention", RingAttention())
    plan = options.pop("plan", None) or llama_plan(config, mesh, attention)
    return reference, parallelize(model, mesh, plan, **options), mesh


def plan_of(change: dict[str, object]) -> ParallelPlan:
    """A right plan on one device, but for a change."""
    right = ParallelPlan(
        tp={}, cp={"layers.*.attention.mixer": RingAttention()}, blocks=("layers.*",)
    )
    return replace(right, **change)


ALONE = Degrees()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"tp": {"layers.*.attention.qkv_proj": ColwiseParallel()}}, "attention.qkv_proj"),
        ({"cp": {"layers.*.attention.mixers": RingAttention()}}, "attention.mixers"),
        ({"cp": {"layers.0.attention.mixer": RingAttention()}}, "every mixer is claimed"),
        ({"blocks": ("blocks.*",)}, r"blocks\.\*"),
        ({"fsdp_units": (("embedding",), ("norm", "head"))}, "'head'"),
        ({"keep_dtype": ("layers.*.attention_norm",)}, "keep_dtype names.*attention_norm"),
    ],
)
@spmd(ranks=1)
def test_name_without_a_module_is_refused_even_on_one_rank(mesh, change, match):
    with pytest.raises(ValueError, match=match):
        a_pair(ALONE, plan=plan_of(change))


@spmd(ranks=1)
def test_tied_parameter_in_two_units_is_refused(mesh):
    with pytest.raises(ValueError, match=r"gathered in one place, got .*embedding\.weight"):
        a_pair(ALONE, replace(CONFIG, tied=True), plan=plan_of({"fsdp_units": (("embedding",),)}))


@spmd(ranks=2)
def test_tied_parameter_placed_in_two_ways_is_refused(mesh):
    plan = plan_of({"tp": {"lm_head": ColwiseParallel()}})
    with pytest.raises(ValueError, match="shared parameter alike"):
        a_pair(Degrees(tp=2), replace(CONFIG, tied=True), plan=plan)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"num_kv_heads": 1}, "num_kv_heads=1 with tp=2.*cp instead"),
        ({"hidden_dim": 51}, "hidden_dim=51 with tp=2"),
        ({"vocab_size": 63}, "vocab_size=63 with tp=2"),
    ],
)
@spmd(ranks=2)
def test_what_tp_does_not_divide_is_refused(mesh, change, match):
    with pytest.raises(ValueError, match=match):
        a_pair(Degrees(tp=2), replace(CONFIG, **change))


def test_no_matmul_to_keep_is_refused():
    with pytest.raises(ValueError, match="matmul_every=0"):
        SelectiveCheckpoint(matmul_every=0)


@spmd(ranks=2)
def test_embedding_gradient_survives_the_entry_into_a_compiled_block(mesh):
    """DTensor's unfinished output would enter the first block's graph and lose its gradient."""
    reference, model, mesh = a_pair(Degrees(tp=2), compile=GRAPHS)
    torch.manual_seed(1)
    one_device(reference, ROWS)
    torch.manual_seed(1)
    on_mesh(model, mesh, ROWS, HeadTail)
    grad = model.embedding.weight.grad
    assert grad.placements == model.embedding.weight.placements
    assert_close(grad.full_tensor(), reference.embedding.weight.grad)


@pytest.mark.slow_where(lambda degrees: degrees.tp == 4)
@pytest.mark.parametrize("degrees", [Degrees(tp=4), Degrees(dp_shard=2, tp=2), Degrees(cp=4)])
@spmd(ranks=4)
def test_clipping_and_a_step_of_adamw_equal_one_device(mesh, degrees):
    """One norm over all gradients takes parameters that all live on the same axes."""
    config = replace(CONFIG, num_kv_heads=4)
    reference, model, mesh = a_pair(degrees, config)
    torch.manual_seed(1)
    one_device(reference, ROWS)
    torch.manual_seed(1)
    on_mesh(model, mesh, ROWS, HeadTail)
    assert len({p.device_mesh for p in model.parameters()}) == 1

    norms = [nn.utils.clip_grad_norm_(m.parameters(), 0.1) for m in (reference, model)]
    for module in (reference, model):
        torch.optim.AdamW(module.parameters(), lr=0.1).step()
    assert_close(norms[1].full_tensor(), norms[0])
    whole = {name: p.full_tensor() for name, p in model.named_parameters()}
    assert_close(whole, dict(reference.named_parameters()))


@spmd(axes={"tp": 2})
def test_sums_over_tp_are_made_for_a_torch_that_does_not_clip_them(mesh):
    """torch 2.11 gives their norm and leaves them as they are."""
    only_tp = ParallelMesh.from_device_mesh(mesh)
    with patch.object(torch, "__version__", TorchVersion("2.11.0")):
        reference, model, mesh = a_pair(Degrees(tp=2))
        with pytest.raises(ValueError, match=r"got torch 2\.11\.0 and .* add dp_shard, of size 1"):
            parallelize(Llama(CONFIG), only_tp, llama_plan(CONFIG, only_tp, RingAttention()))
    torch.manual_seed(1)
    one_device(reference, ROWS)
    torch.manual_seed(1)
    on_mesh(model, mesh, ROWS, HeadTail)
    assert not any(x.is_partial() for p in model.parameters() for x in p.grad.placements)
    for each in (reference, model):
        nn.utils.clip_grad_norm_(each.parameters(), 0.1)
    whole = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    assert_close(whole, {name: p.grad for name, p in reference.named_parameters()})


@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, tied=True)])
@spmd(axes={"dp_shard": 2, "tp": 2})
def test_parallel_model_keeps_the_names_of_its_state(mesh, config):
    names = list(Llama(config).state_dict())
    _, model, _ = a_pair(
        Degrees(dp_shard=2, tp=2), config, compile=GRAPHS, activation_checkpoint=FullCheckpoint()
    )
    assert list(model.state_dict()) == names


@pytest.mark.slow_where(lambda tied: tied)
@pytest.mark.parametrize("tied", [False, True])
@spmd(ranks=4)
def test_meta_build_is_filled_by_init_weights(mesh, tied):
    """And trains: every parameter gets a gradient that is not zero."""
    config = replace(CONFIG, tied=tied)
    with torch.device("meta"):
        model = Llama(config)
    mesh = ParallelMesh.from_degrees(Degrees(dp_shard=2, tp=2), "cpu")
    parallelize(model, mesh, llama_plan(config, mesh, RingAttention()))
    model.to_empty(device="cpu")
    model.init_weights()
    on_mesh(model, mesh, ROWS, HeadTail)
    assert len(list(model.parameters())) == len(list(Llama(config).parameters()))
    for name, grad in gradients(model).items():
        assert grad.isfinite().all() and grad.any(), name


@pytest.mark.parametrize(
    ("checkpoint", "again"),
    [(NoCheckpoint(), 0), (FullCheckpoint(), 1), (SelectiveCheckpoint(), 0)],
)
@spmd(ranks=2)
def test_selective_checkpoint_repeats_no_all_reduce(mesh, checkpoint, again):
    """A layer all-reduces twice forward and twice backward; recomputing it all, once more."""
    _, model, mesh = a_pair(Degrees(tp=2), activation_checkpoint=checkpoint)
    with CommDebugMode() as sent:
        on_mesh(model, mesh, ROWS, HeadTail)
    all_reduces = sent.get_comm_counts()[torch.ops.c10d_functional.all_reduce]
    embedding_and_head = 2
    assert all_reduces == CONFIG.num_layers * (4 + again) + embedding_and_head


@pytest.mark.parametrize(
    ("attention", "graphs"),
    [(RingAttention(), (1, 0)), (RingAttention(boundary=EagerIsland()), (2, 1))],
)
@spmd(ranks=2)
def test_further_batches_make_no_further_graphs(mesh, attention, graphs):
    """Whatever their documents; gradients add up to those of one device."""
    reference, model, mesh = a_pair(Degrees(cp=2), attention=attention, compile=GRAPHS)
    batches = (((32,), (1, 31)), ((9, 16, 6), (32,)), ((1,), (1, 1, 1)))
    expected = graphs
    for rows in batches:
        torch.manual_seed(1)
        one_device(reference, rows)
        torch.manual_seed(1)
        with count_graphs() as counted:
            on_mesh(model, mesh, rows, HeadTail)
        assert (counted.graphs, counted.breaks) == expected
        assert_close(gradients(model), gradients(reference))
        expected = (0, 0)


class Convolved(nn.Module):
    """A block with a mixer of another family than attention."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.mixer = nn.Parameter(torch.randn(4, 3)), CausalConv1d(3)

    def forward(self, x, attn_metadata):
        return x + self.mixer(x.sin(), self.weight, attn_metadata).cos()


class OneBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Convolved()

    def forward(self, x, attn_metadata):
        return self.block(x, attn_metadata)


@spmd(ranks=2)
def test_a_block_breaks_once_at_an_island_of_any_mixer(mesh):
    """It was compiled as one graph, which an island cannot be in."""
    mesh = ParallelMesh.from_degrees(Degrees(cp=2), "cpu")
    style = CausalConvCP(boundary=EagerIsland())
    plan = ParallelPlan(tp={}, cp={"block.mixer": style}, blocks=("block",))
    model = OneBlock()
    parallelize(model, mesh, plan, activation_checkpoint=FullCheckpoint(), compile=GRAPHS)
    local, sharded = shard_batch({"inputs_embeds": torch.randn(1, 16, 4)}, mesh, model=model)
    with count_graphs() as counted:
        model(local["inputs_embeds"], sharded.attn_metadata).sum().backward()
    assert (counted.graphs, counted.breaks) == (2, 1)


@spmd(ranks=2)
def test_bf16_compute_is_as_near_to_the_truth_as_on_one_device(mesh):
    bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    pair = a_pair(Degrees(cp=2), dtype=torch.float32, fsdp=FSDP(mixed_precision=bf16))
    one, ours = distances_in_bf16(*pair)
    assert ours < 1.1 * one


@spmd(ranks=(1, 2))
def test_weights_are_cast_where_no_axis_shards_them(mesh, ranks):
    """One rank, or tp alone: fully_shard, on an axis of one rank, is what computes in bf16."""
    bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    degrees, fsdp = Degrees(tp=ranks), FSDP(mixed_precision=bf16)
    truth, model, mesh = a_pair(degrees, dtype=torch.float32, fsdp=fsdp)
    seen = set()
    model.get_submodule("layers.0").register_forward_hook(lambda *args: seen.add(args[-1].dtype))
    one, ours = distances_in_bf16(truth, model, mesh)
    assert seen == {torch.bfloat16}
    assert 0 < ours < 1.1 * one
    # What changes nothing needs no hooks.
    same = FSDP(mixed_precision=MixedPrecisionPolicy(param_dtype=torch.float32))
    _, plain, _ = a_pair(degrees, dtype=torch.float32, fsdp=same)
    assert not any(isinstance(module, FSDPModule) for module in plain.modules())
    with pytest.raises(ValueError, match=r"got FSDP\(.*bfloat16.* without an axis of theirs"):
        parallelize(truth, replace(mesh, narrow=None), plan_of({}), fsdp=fsdp)


def distances_in_bf16(truth: Llama, model: nn.Module, mesh: ParallelMesh) -> tuple[Tensor, Tensor]:
    """How far gradients in bf16 are from the truth's, on one device and of the model on a mesh."""
    rounded = Llama(CONFIG).bfloat16()
    rounded.load_state_dict(truth.state_dict())
    for run in (
        lambda: one_device(truth, ROWS),
        lambda: one_device(rounded, ROWS),
        lambda: on_mesh(model, mesh, ROWS, HeadTail),
    ):
        torch.manual_seed(1)
        run()
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
    true, one, ours = (gradients(m) for m in (truth, rounded, model))
    return distance(one, true), distance(ours, true)


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> Tensor:
    return torch.stack([(a[name].float() - b[name].float()).norm() for name in b]).norm()


@spmd(ranks=4)
def test_every_block_and_unit_is_gathered_on_its_own(mesh):
    _, model, mesh = a_pair(Degrees(dp_replicate=2, dp_shard=2))
    sharded = [name for name, module in model.named_modules() if isinstance(module, FSDPModule)]
    layers = [f"layers.{i}" for i in range(CONFIG.num_layers)]
    assert sorted(sharded) == sorted(["", "embedding", "norm", "lm_head", *layers])
    assert mesh.hsdp.size() == dist.get_world_size()


@spmd(ranks=2)
def test_logits_under_tp_are_sharded_in_the_vocabulary(mesh):
    _, model, mesh = a_pair(Degrees(tp=2), tiny(), dtype=torch.float32)
    kept = {}
    model.lm_head.register_forward_hook(lambda module, args, out: kept.update(logits=out))
    on_mesh(model, mesh, ROWS, HeadTail)
    assert isinstance(kept["logits"], DTensor)
    assert kept["logits"].placements == (Shard(2),)


@spmd(ranks=2)
def test_a_sum_over_tp_has_its_gradient_from_the_compiled_block_that_reads_it(mesh):
    """One still on its way would lose it without a word."""
    part, cotangent = torch.randn(2, 5, dtype=torch.float64)
    whole = part.clone()
    dist.all_reduce(whole)
    block = torch.compile(torch.sin, backend="aot_eager", fullgraph=True)
    total = reduce_from_region(part.requires_grad_(), mesh)
    (grad,) = torch.autograd.grad(block(total), part, cotangent)
    assert_close(grad, cotangent * whole.cos())
