"""What a plan says of a model, on one device and on many."""

import warnings
from types import SimpleNamespace

import pytest
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.mixer_plan import apply_plan, find
from dtcp.parallelize import ParallelPlan, parallelize
from dtcp.parallelize.tensor_parallel import ReplicatedParams
from dtcp.sequence.masks import Causal
from dtcp.softmax import RingAttention
from dtcp.softmax.mixer import SoftmaxAttention
from tests.harness.spmd import spmd


def applied(mesh, *modules):
    model = nn.Sequential(SoftmaxAttention(Causal()), *modules)
    return apply_plan(model, mesh, {"0": RingAttention()})


@spmd(ranks=2)
def test_dropout_of_a_model_whose_rows_are_cut_is_warned_of(mesh):
    with pytest.warns(UserWarning, match=r"got '2' with p=0\.1: use dtcp.TokenDropout"):
        applied(mesh, nn.Dropout(0.0), nn.Dropout(0.1))
    with warnings.catch_warnings(action="error"):
        applied(mesh, nn.Dropout(0.0), nn.Dropout(0.1).eval())
        applied(None, nn.Dropout(0.1))


@spmd(ranks=2)
def test_a_scale_for_all_tokens_of_a_rank_is_warned_of(mesh):
    """As a float8 layer of torchao has it where nobody has named a recipe."""

    def scaled(by):
        layer, granularity = nn.Linear(2, 2), SimpleNamespace(value=by)
        cast = SimpleNamespace(scaling_granularity=granularity)
        layer.config = SimpleNamespace(cast_config_input=cast)
        return layer

    with pytest.warns(UserWarning, match=r"got '2' \(Linear\) with one scale per tensor: give"):
        applied(mesh, scaled("axiswise"), scaled("tensorwise"))
    with warnings.catch_warnings(action="error"):
        applied(mesh, scaled("axiswise"))
        applied(None, scaled("tensorwise"))


@spmd(ranks=2)
def test_a_key_that_names_modules_in_some_layers_alone_is_quiet(mesh):
    """torch warned of each layer of a hybrid without one, as of an entry that it skipped."""
    layers = {"mix": SoftmaxAttention(Causal())}, {"conv": nn.Linear(2, 2)}
    model = nn.ModuleList(nn.ModuleDict(layer) for layer in layers)
    with warnings.catch_warnings(action="error"):
        apply_plan(model, mesh, {"*.mix": RingAttention()})
    assert model[0]["mix"].style is not None


def test_a_key_names_a_module_of_several_parents_by_any_of_its_names():
    shared = SoftmaxAttention(Causal())
    model = nn.ModuleDict({"first": shared, "second": shared})
    for key in model:
        assert find(model, [key]) == {key: shared}
    assert find(model, ["*"]) == {"first": shared}
    with pytest.raises(ValueError, match="key='third', which matches none"):
        find(model, ["third"])


@spmd(ranks=2)
def test_a_style_that_has_a_mixer_does_not_take_it_over_on_another_mesh(mesh):
    """On its own it does so once: of a mixer that several parents share."""
    style, model = RingAttention(), nn.ModuleList([SoftmaxAttention(Causal())])
    for _ in range(2):
        parallelize_module(model, mesh, {"0": style})
    other = DeviceMesh("cpu", [0, 1], mesh_dim_names=("other",))
    with pytest.raises(TypeError, match=r"that RingAttention\(.* has: .* apply a plan once"):
        parallelize_module(model, other, {"0": style})
    assert model[0].mesh == mesh


@spmd(ranks=2)
def test_a_model_without_a_mixer_is_warned_of(mesh):
    """Each rank attended to its own tokens, and nothing said so."""
    ranks, plan = ParallelMesh.from_degrees(Degrees(cp=2), "cpu"), ParallelPlan({}, {}, blocks=())
    with pytest.warns(UserWarning, match="cp=2 and a Linear without one"):
        parallelize(nn.Linear(2, 2), ranks, plan)
    with warnings.catch_warnings(action="error"):
        parallelize(nn.Linear(2, 2), ParallelMesh.from_degrees(Degrees(dp_shard=2), "cpu"), plan)


@spmd(ranks=2)
def test_weights_that_no_style_of_tp_places_are_warned_of(mesh):
    """Their gradients have no norm with the others, which clip_grad_norm_ said in torch's words."""
    ranks, tp = ParallelMesh.from_degrees(Degrees(tp=2), "cpu"), {"0": ColwiseParallel()}
    with pytest.warns(UserWarning, match=r"got 2 of 4 that no style places, '1.weight' first"):
        parallelize(two_layers(), ranks, ParallelPlan(tp, {}, blocks=()))
    with warnings.catch_warnings(action="error"):
        plan = ParallelPlan(tp | {"1": ReplicatedParams()}, {}, blocks=())
        parallelize(two_layers(), ranks, plan)


def two_layers():
    return nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))


@pytest.mark.parametrize("whole", [False, True])
@spmd(ranks=2)
def test_a_kernel_that_a_plan_names_computes_on_one_device_and_on_many(mesh, whole):
    """It was named on several ranks alone: one device took the kernel that it likes best."""
    mixers = [SoftmaxAttention(Causal()), SoftmaxAttention(Causal(), kernel="triton")]
    model = nn.ModuleDict({"named": mixers[0], "own": mixers[1]})
    plan = {"named": RingAttention(kernel="reference"), "own": RingAttention()}
    apply_plan(model, None if whole else mesh, plan)
    assert [mixer.kernel for mixer in mixers] == ["reference", "triton"]
