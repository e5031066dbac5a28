"""Heads of transformers' models over tp where transformers has no plan: exact, and a part of all.

Every model is held against itself on one device, in fp64, by loss and all gradients.
"""

import re
import tempfile
from pathlib import Path

import pytest
from torch import distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.parallelize import parallelize_hf, save_hf
from dtcp.parallelize.plans.huggingface_tensor_plan import hf_tensor_plan
from dtcp.parallelize.plans.inferred_heads import inferred_heads
from dtcp.parallelize.tensor_parallel import LocalParams
from tests.harness.hf_models import build
from tests.harness.spmd import spmd
from tests.huggingface.test_hf_families import assert_step_equal, checked_family
from tests.huggingface.test_huggingface import assert_same_step
from tests.huggingface.test_latents import SMALL
from tests.huggingface.test_lora import adapted, on_mesh_of
from tests.huggingface.test_save_hf import assert_saved, in_a_folder

MLA = ("deepseek_v3", "longcat_flash", "minicpm3", "bailing_hybrid")
BY_TRIAL = ("t5", "bart of two sequences", "bert")


def kept(model, pattern):
    """How many numbers a rank keeps of the parameters whose names match, and how many there are."""
    local = whole = 0
    for name, p in model.named_parameters():
        if re.search(pattern, name):
            local += (p.to_local() if isinstance(p, DTensor) else p).numel()
            whole += p.numel()
    return local, whole


@pytest.mark.slow_where(lambda kind, pattern: kind != "t5")
@pytest.mark.parametrize(
    ("kind", "pattern"),
    [
        ("t5", r"Attention\.|DenseReluDense\."),
        ("bart of two sequences", r"_attn\.[qkv]_proj|_attn\.out_proj\.weight|fc1|fc2\.weight"),
        ("longcat_flash", r"(q_b|kv_b|o)_proj"),
    ],
)
@spmd(ranks=2)
def test_tp_rank_keeps_its_heads(mesh, kind, pattern):
    mesh = ParallelMesh.from_degrees(Degrees(tp=2), "cpu")
    local, whole = kept(parallelize_hf(checked_family(kind).build(), mesh), pattern)
    assert 2 * local == whole > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*MLA, *BY_TRIAL])
@spmd(ranks=4)
def test_tp_of_split_heads_equals_one_device(mesh, kind):
    """Packed rows on cp 2 x tp 2: latents, biases by distance, keys of another sequence."""
    assert_step_equal(kind, Degrees(cp=2, tp=2))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "targets", "change"),
    [("deepseek_v3", ("q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"), SMALL)],
)
@spmd(ranks=4)
def test_lora_on_split_heads_equals_one_device(mesh, kind, targets, change):
    models = [adapted(kind, targets, **change) for _ in range(2)]
    assert_same_step(models[0], *on_mesh_of(models[1], Degrees(cp=2, tp=2)))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "change"), [("deepseek_v3", SMALL)])
@spmd(ranks=2)
def test_saved_split_heads_are_what_transformers_writes(mesh, kind, change):
    def body(folder):
        plain, model = build(kind, **change), build(kind, **change)
        parallelize_hf(model, ParallelMesh.from_degrees(Degrees(tp=2), "cpu"))
        if dist.get_rank() == 0:
            assert_saved(model, plain, folder)
        else:
            save_hf(model, Path(tempfile.mkdtemp()) / "ours")

    in_a_folder(body)


def test_heads_that_tp_does_not_divide_are_whole_and_said_to_be(caplog):
    """The rest of a block is split all the same."""
    model = checked_family("t5").build()
    with caplog.at_level("WARNING", "dtcp.parallelize.plans"):
        plan = hf_tensor_plan(model, 8)
    said = {each.partition(" is whole on each of 8")[0] for each in caplog.messages}
    part = "encoder.block.0.layer"
    assert "encoder.block.*.layer.*.SelfAttention" in said and len(said) == 3
    assert isinstance(plan[f"{part}.0.SelfAttention.q"], LocalParams)
    assert isinstance(plan[f"{part}.1.DenseReluDense.wi"], ColwiseParallel)


class Attention(nn.Module):
    """Attention with four heads, of queries that are normalized over all heads or not at all."""

    def __init__(self, *, normed):
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.norm = nn.LayerNorm(8) if normed else nn.Identity()

    def forward(self, x):
        projected = self.norm(self.query(x)), self.key(x), self.value(x)
        q, k, v = (each.unflatten(-1, (-1, 2)).transpose(1, 2) for each in projected)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", None)
        return self.out(attend(self, q, k, v, None)[0].flatten(2))


@pytest.mark.parametrize(("normed", "tp", "splits"), [(0, 2, True), (1, 2, False), (0, 8, False)])
def test_layers_of_heads_are_found_by_running_them(normed, tp, splits):
    """No rank has all that a norm of all heads reads; nor a part of a head."""
    model = nn.ModuleDict({"it": Attention(normed=normed)})
    roles = inferred_heads(model, dict(model.named_modules()), {}, tp)
    ups = {f"it.{name}": "colwise" for name in ("query", "key", "value")}
    assert roles == ({**ups, "it.out": "rowwise"} if splits else {})
