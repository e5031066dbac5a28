"""Experts: equal to a loop over tokens, compiled and split over ranks."""

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn import functional as F
from torch.testing import assert_close

from dtcp.compile import count_graphs
from dtcp.models.moe import Experts
from dtcp.parallelize.experts import ExpertTensorParallel
from tests.harness.spmd import spmd

N, K, E, DIM, HIDDEN = 13, 3, 5, 6, 8


def gated(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def one_by_one(experts: Experts, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """Each token through each of its experts, alone."""
    return torch.stack(
        [
            sum(
                share * (experts.down[e] @ gated(experts.gate[e] @ token, experts.up[e] @ token))
                for e, share in zip(chosen.tolist(), shares, strict=True)
            )
            for token, chosen, shares in zip(x, index, weight, strict=True)
        ]
    )


def a_case(dtype: torch.dtype = torch.float64) -> tuple[Experts, list[Tensor], Tensor]:
    """Experts of which one is never chosen, inputs, and a cotangent."""
    experts = Experts(DIM, HIDDEN, E, gated).to(dtype)
    x = torch.randn(N, DIM, dtype=dtype)
    index = torch.stack([torch.randperm(E - 1)[:K] for _ in range(N)])
    return experts, [x, index, torch.rand(N, K, dtype=dtype)], torch.randn(N, DIM, dtype=dtype)


def gradients(out: Tensor, cotangent: Tensor, *inputs: Tensor) -> list[Tensor]:
    grads = torch.autograd.grad(out, inputs, cotangent)
    return [g.full_tensor() if isinstance(g, DTensor) else g for g in grads]


def leaves(x: Tensor, index: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x.detach().requires_grad_(), index, weight.detach().requires_grad_()


@pytest.mark.parametrize("compiled", [False, True])
def test_experts_equal_a_loop_over_tokens(compiled):
    experts, inputs, cotangent = a_case()
    x, index, weight = leaves(*inputs)
    expected = one_by_one(experts, x, index, weight)
    wanted = gradients(expected, cotangent, x, weight, *experts.parameters())
    call = torch.compile(experts, backend="aot_eager", fullgraph=True) if compiled else experts
    out = call(x, index, weight)
    assert_close(out, expected)
    assert_close(gradients(out, cotangent, x, weight, *experts.parameters()), wanted)


def test_another_choice_of_experts_is_the_same_graph():
    experts, (x, index, weight), _ = a_case()
    with count_graphs() as graphs:
        call = torch.compile(experts, backend="aot_eager", fullgraph=True)
        for shift in range(4):
            call(x, (index + shift) % E, weight)
    assert graphs.graphs == 1


def test_half_precision_is_near_the_truth():
    experts, inputs, _ = a_case(torch.bfloat16)
    exact = one_by_one(experts.double(), inputs[0].double(), inputs[1], inputs[2].double())
    out = experts.bfloat16()(*inputs)
    assert_close(out.double(), exact, rtol=2e-2, atol=1e-3 * exact.abs().max().item() + 1e-5)


@pytest.mark.slow_where(lambda compiled, ranks: compiled and ranks == 4)
@pytest.mark.parametrize("compiled", [False, True])
@spmd(ranks=(2, 4))
def test_split_experts_equal_whole_ones(mesh, compiled):
    whole, inputs, cotangent = a_case()
    split = Experts(DIM, HIDDEN, E, gated).double()
    split.load_state_dict(whole.state_dict())
    parallelize_module(split, mesh, ExpertTensorParallel())
    x, index, weight = leaves(*inputs)
    expected = whole(x, index, weight)
    wanted = gradients(expected, cotangent, x, weight, *whole.parameters())
    call = torch.compile(split, backend="aot_eager", fullgraph=True) if compiled else split
    out = call(x, index, weight)
    assert_close(out, expected)
    assert_close(gradients(out, cotangent, x, weight, *split.parameters()), wanted)


@spmd(ranks=3)
def test_experts_that_tp_does_not_divide_are_refused(mesh):
    with pytest.raises(ValueError, match=r"hidden_dim=8 with tp=3"):
        parallelize_module(Experts(DIM, HIDDEN, E, gated), mesh, ExpertTensorParallel())
    with pytest.raises(TypeError, match=r"got a Linear"):
        parallelize_module(torch.nn.Linear(2, 2), mesh, ExpertTensorParallel())
