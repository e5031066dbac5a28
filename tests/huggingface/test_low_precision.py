"""Layers that torchao puts into a model for training, by stand-ins: rounded weights and inputs."""

import sys

import pytest
import torch
from torch import nn

from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.parallelize import parallelize_hf
from dtcp.parallelize.plans.huggingface_tensor_plan import hf_tensor_plan
from tests.harness.hf_models import build
from tests.harness.spmd import spmd
from tests.huggingface.test_huggingface import assert_same_step


class RoundedInGroups(nn.Module):
    """Rounds to whole numbers of a step for every eight; straight through in backward."""

    def forward(self, x):
        groups = x.unflatten(-1, (-1, 8))
        step = groups.detach().abs().amax(-1, keepdim=True) / 7
        return x + ((groups / step).round() * step - groups).detach().flatten(-2)


class RoundedLinear(nn.Linear):
    """As for quantization-aware training: a module inside rounds its weight."""

    def __init__(self, layer):
        super().__init__(layer.in_features, layer.out_features, False, dtype=torch.float64)
        self.weight, self.rounded = layer.weight, RoundedInGroups()

    def forward(self, x):
        return nn.functional.linear(x, self.rounded(self.weight))


class ScaledByAll(nn.Linear):
    """As torchao's float8 layers of one scale per tensor."""

    def forward(self, x):
        scale = x.detach().abs().amax() / 7
        return super().forward((x / scale).round() * scale)


def changed(model):
    for layer in model.model.layers:
        for part, names in ((layer.self_attn, "qo"), (layer.mlp, ("up", "down"))):
            for name in names:
                rounded = RoundedLinear(part.get_submodule(f"{name}_proj"))
                setattr(part, f"{name}_proj", rounded)
    return model


@spmd(axes={"cp": 2, "tp": 2})
def test_linear_layers_with_modules_inside_are_whole_under_tp(mesh):
    """torch's styles failed on what is inside; a rank's part would have other groups."""
    mesh = ParallelMesh.from_degrees(Degrees(cp=2, tp=2), "cpu")
    model = parallelize_hf(changed(build("llama")), mesh)
    assert_same_step(changed(build("llama")), model, mesh)


@spmd(ranks=2)
def test_one_scale_for_all_tokens_of_a_layer_is_refused(mesh):
    model = build("llama")
    model.model.layers[1].mlp.up_proj.__class__ = ScaledByAll
    with pytest.raises(ValueError, match=r"1\.mlp\.up_proj \(ScaledByAll\).*token by token"):
        parallelize_hf(model, ParallelMesh.from_degrees(Degrees(cp=2), "cpu"))


@pytest.mark.parametrize("owner", ["layers.0.self_attn", "norm"])
def test_a_kernel_that_takes_memory_is_refused_under_tp(owner, monkeypatch):
    """Liger's, patched over a function that attention calls, or over a class."""
    model = build("llama")
    module = model.model.get_submodule(owner)
    patched = module if owner == "norm" else sys.modules[type(module).__module__]
    name = "forward" if owner == "norm" else "apply_rotary_pos_emb"

    def kernel(*args, **kwargs):
        raise AssertionError

    kernel.__module__ = "liger_kernel.transformers.rope"
    monkeypatch.setattr(patched, name, kernel)
    with pytest.raises(ValueError, match=rf"model\.{owner} \(Llama.*\) with a kernel of Liger"):
        hf_tensor_plan(model, 2)


def test_a_parametrization_is_refused_under_tp():
    model = build("llama")
    nn.utils.parametrizations.weight_norm(model.model.layers[1].mlp.up_proj)
    with pytest.raises(ValueError, match=r"got model\.layers\.1\.mlp\.up_proj .* parametrization"):
        hf_tensor_plan(model, 2)
