"""An optimizer that steps shards otherwise than whole weights is refused before its first step."""

import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers.optimization import Adafactor

from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.parallelize import parallelize_hf
from dtcp.trainers.optimizer_trial import _ways, check_steps_shards
from tests.harness.hf_models import build
from tests.harness.spmd import spmd


class Scaled(torch.optim.Optimizer):
    """Steps by the ratio of two norms, as LAMB does: on the host, where one is a shard's."""

    def __init__(self, params, lr=0.1, *, whole=True):
        super().__init__(params, {"lr": lr})
        self.whole = whole

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    norms = [self.norm(x).item() for x in (p, p.grad)]
                    p.sub_(p.grad, alpha=group["lr"] * norms[0] / norms[1])

    def norm(self, x):
        return x.full_tensor().norm() if self.whole and isinstance(x, DTensor) else x.norm()


class Several(torch.optim.Optimizer):
    """Steps by others, as recipes with Muon for matrices and Adam for the rest do."""

    def __init__(self, *others):
        super().__init__([p for each in others for p in weights_of(each)], {"lr": 0.1})
        self.others = list(others)
        self.param_groups = [group for each in others for group in each.param_groups]

    def step(self, closure=None):
        for each in self.others:
            each.step()


def weights_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


class Averaged(torch.optim.SGD):
    """Has to know when it trains, and uses up gradients, as schedule-free ones do."""

    trains = False

    def train(self):
        self.trains = True

    @torch.no_grad()
    def step(self, closure=None):
        if not self.trains:
            raise RuntimeError("call train first")
        super().step()
        for p in weights_of(self):
            if p.grad is not None:
                p.grad.mul_(2)


class Idle(Averaged):
    def step(self, closure=None):
        """Of one whose hooks step in backward, or whose wrapper does."""


@spmd(axes={"cp": 2, "tp": 2})
def test_optimizer_that_goes_by_a_shard_is_refused(mesh):
    """And none whose sums are those of whole weights; neither has stepped a weight of the model."""
    model = parallelize_hf(build("llama"), ParallelMesh.from_degrees(Degrees(cp=2, tp=2), "cpu"))
    weights = list(model.parameters())
    before = [p.full_tensor().clone() for p in weights]
    matrices = [p for p in weights if p.ndim == 2]
    adam = torch.optim.AdamW(weights)
    torch.optim.lr_scheduler.LambdaLR(adam, lambda step: step / 10)  # no rate at first
    for optimizer in (adam, Scaled(weights), torch.optim.Muon(matrices)):
        check_steps_shards(optimizer)
        assert not optimizer.state
    by_shard = Scaled([{"params": weights[:1]}, {"params": weights[1:]}], whole=False)
    with pytest.raises(ValueError, match=r"test_optimizer_trial\.Scaled, whose steps are .* off"):
        check_steps_shards(by_shard)
    with pytest.raises(ValueError, match=r"optimization\.Adafactor, which fails on them \(Runtime"):
        check_steps_shards(Adafactor(weights))
    assert all(torch.equal(p.full_tensor(), x) for p, x in zip(weights, before, strict=True))
    assert all(p.grad is None for p in weights)


@spmd(ranks=2)
def test_optimizer_is_tried_once_for_groups_that_differ_by_their_rates(mesh):
    """Recipes give each layer a rate of its own."""
    model = parallelize_hf(build("llama"), ParallelMesh.from_degrees(Degrees(cp=2), "cpu"))
    matrices = [p for p in model.parameters() if p.ndim == 2]
    groups = [
        {"params": [p], "lr": 0.1 + 0.1 * index, "weight_decay": 0.0 if index < 2 else 0.1}
        for index, p in enumerate(matrices)
    ]
    ways = list(_ways(torch.optim.AdamW(groups)))
    assert [group["lr"] for group, *_ in ways] == [0.1, 0.1 + 0.1 * 2]


@spmd(ranks=2)
def test_optimizers_that_one_holds_are_tried_within_it(mesh):
    """Each on the weights that are its own; and one whose step does nothing was not tried."""
    model = parallelize_hf(build("llama"), ParallelMesh.from_degrees(Degrees(cp=2), "cpu"))
    weights = list(model.parameters())
    matrices, others = ([p for p in weights if (p.ndim == 2) == of] for of in (True, False))
    muon = torch.optim.Muon(matrices)
    check_steps_shards(Several(muon, torch.optim.AdamW(others)))
    assert not muon.state
    by_shard = Several(torch.optim.AdamW(others), Scaled(matrices, whole=False))
    with pytest.raises(ValueError, match=r"Several, whose steps are .* off"):
        check_steps_shards(by_shard)
    check_steps_shards(Averaged(weights, lr=0.1))
    with pytest.raises(ValueError, match=r"Idle, whose method step changes nothing in 8 calls"):
        check_steps_shards(Idle(weights, lr=0.1))
    check_steps_shards(Idle(weights, lr=0.0))
