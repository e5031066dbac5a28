"""What a plan says of a model, on one device and on many."""

import warnings

import pytest
from torch import nn

from dtcp.mixer_plan import apply_plan
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


@pytest.mark.parametrize("whole", [False, True])
@spmd(ranks=2)
def test_a_kernel_that_a_plan_names_computes_on_one_device_and_on_many(mesh, whole):
    """It was named on several ranks alone: one device took the kernel that it likes best."""
    mixers = [SoftmaxAttention(Causal()), SoftmaxAttention(Causal(), kernel="triton")]
    model = nn.ModuleDict({"named": mixers[0], "own": mixers[1]})
    plan = {"named": RingAttention(kernel="reference"), "own": RingAttention()}
    apply_plan(model, None if whole else mesh, plan)
    assert [mixer.kernel for mixer in mixers] == ["reference", "triton"]
