"""Losses of routers over the tokens of all ranks: equal to one device, value and gradients."""

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.testing import assert_close

from dtcp.compile import count_graphs
from dtcp.distributed.ledger import count_traffic
from dtcp.experts import RouterLoss, balance_loss_share, z_loss_share
from dtcp.mixer_plan import apply_plan
from tests.harness.spmd import spmd

N, E, K = 12, 6, 2


def router(x, weight):
    logits = x @ weight
    probabilities = logits.softmax(-1)
    chosen, index = probabilities.topk(K, dim=-1)
    return logits, probabilities, chosen, index


def a_case(ranks):
    x = torch.randn(ranks * N, 8, dtype=torch.float64)
    weight = torch.randn(8, E, dtype=torch.float64)
    return x, weight, torch.rand(ranks * N) < 0.7


def by_hand(x, weight, real, balance, z):
    """Token by token and expert by expert, of those that are no padding."""
    logits, probabilities, _, index = router(x[real], weight)
    tokens = len(logits)
    total = 0.0
    for expert in range(E):
        often = sum(int(expert in row) for row in index.tolist()) / tokens
        total = total + often * probabilities[:, expert].mean()
    return balance * E * total + z * torch.log(logits.exp().sum(1)).square().mean()


def test_router_losses_of_experts_are_those_of_the_papers():
    x, weight, real = a_case(1)
    logits, probabilities, _, index = router(x, weight)
    expected = by_hand(x, weight, real, 1.0, 0.0), by_hand(x, weight, real, 0.0, 1.0)
    assert_close(balance_loss_share(probabilities, index, axis=None, real=real), expected[0])
    assert_close(z_loss_share(logits, axis=None, real=real), expected[1])
    even = torch.full((E, E), 1 / E, dtype=torch.float64)
    turns = (torch.arange(E)[:, None] + torch.arange(K)) % E
    assert_close(
        balance_loss_share(even, turns, axis=None), torch.tensor(float(K), dtype=torch.float64)
    )


def test_balance_loss_of_experts_is_that_of_transformers():
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    x, weight, _ = a_case(1)
    logits, probabilities, _, index = router(x, weight)
    theirs = load_balancing_loss_func((logits,), E, K)
    assert_close(balance_loss_share(probabilities, index, axis=None).float(), theirs)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@spmd(ranks=2)
def test_router_losses_of_experts_on_ranks_equal_one_device(mesh, compiled):
    """Shares and their gradients sum to those of all tokens; the last rank has padding only."""
    x, weight, real = a_case(2)
    real[-N:] = False
    whole = weight.clone().requires_grad_()
    expected = by_hand(x, whole, real, 0.5, 0.25)
    expected.backward()
    mine = slice(mesh.get_local_rank() * N, (mesh.get_local_rank() + 1) * N)
    own = weight.clone().requires_grad_()
    loss = RouterLoss(balance=0.5, z=0.25)
    loss.axis = mesh

    def routed(x, weight, real):
        logits, probabilities, chosen, index = router(x, weight)
        return loss(chosen, logits=logits, probabilities=probabilities, index=index, real=real)

    call = torch.compile(routed, backend="aot_eager", fullgraph=True) if compiled else routed
    with count_graphs() as graphs, count_traffic() as traffic:
        out = call(x[mine], own, real[mine])
        (out * 0).sum().backward()
    assert (graphs.graphs, graphs.breaks) == (int(compiled), 0)
    assert traffic.received == 8 * (E + 2), traffic
    shares = loss.shares.double()
    dist.all_reduce(shares, group=mesh.get_group())
    assert_close(0.5 * shares[0] + 0.25 * shares[1], expected.detach(), rtol=1e-6, atol=0)
    assert_close(out, router(x[mine], weight)[2])
    dist.all_reduce(own.grad, group=mesh.get_group())
    assert_close(own.grad, whole.grad)


def test_router_losses_of_experts_count_in_training_alone_and_once_per_step():
    x, weight, real = a_case(1)
    loss = RouterLoss(z=0.5)
    grads = []
    for parts in (1, 4, 0):
        own = weight.clone().requires_grad_()
        loss.train(parts > 0).parts = parts
        logits, probabilities, chosen, index = router(x, own)
        out = loss(chosen, logits=logits, probabilities=probabilities, index=index, real=real)
        (out * 0).sum().backward()
        grads.append(own.grad)
    assert_close(grads[0], 4 * grads[1])
    assert not grads[2].any()
    with pytest.raises(ValueError, match=r"got balance=-1.0, z=0.0: give 0"):
        RouterLoss(balance=-1.0)
    assert isinstance(loss, nn.Module) and "z=0.5" in repr(loss)


@spmd(ranks=2)
def test_router_losses_of_experts_that_know_no_ranks_are_refused_with_the_plan(mesh):
    """A loss over this rank's tokens is another one, and nothing else would tell."""
    model = nn.ModuleDict({"idle": RouterLoss(), "router_loss": RouterLoss(balance=0.5)})
    with pytest.raises(ValueError, match=r"got 'router_loss' with balance=0.5, z=0.0 and axis"):
        apply_plan(model, mesh, {})
    model["router_loss"].axis = mesh
    assert apply_plan(model, mesh, {}) is model
