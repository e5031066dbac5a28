"""Numbers of a run that are the same on every mesh: its largest loss, the tokens it has seen."""

import math
from types import SimpleNamespace

import pytest
import torch

from dtcp.pretrain.row_losses import RowLosses
from dtcp.pretrain.trainer import Trainer
from tests.harness.spmd import spmd

IGNORED = -100


def axes_of(mesh):
    return SimpleNamespace(get_optional_mesh=lambda name: mesh[name])


@spmd(axes={"batch": 2, "cp": 2})
def test_the_largest_loss_is_that_of_the_rows_of_a_data_parallel_rank(mesh):
    """Two micro-batches of rows whose tokens lie anywhere on two ranks."""
    generator = torch.Generator().manual_seed(0)
    losses = torch.rand(2, 2, 8, generator=generator, dtype=torch.float64)  # [batch, part, S]
    labels = torch.randint(9, (2, 2, 8), generator=generator)
    labels[torch.rand(2, 2, 8, generator=generator) < 0.4] = IGNORED
    losses[labels == IGNORED] = 0.0
    count = (labels != IGNORED).sum()
    found, batch, cp = RowLosses(axes_of(mesh)), *mesh.get_coordinate()
    for part in range(2):
        own = losses[batch, part, [[0, 1, 2, 7, 6], [3, 4, 5]][cp]].sum() / count
        found.add(own, labels[batch, part][None], count)
    means = losses.sum((1, 2)) / (labels != IGNORED).sum((1, 2))
    assert found.largest() == pytest.approx(means.max().item())
    found.clear()
    assert math.isnan(found.largest())


@spmd(axes={"batch": 2, "cp": 2})
def test_rows_without_a_label_have_no_largest_loss(mesh):
    found, batch, _ = RowLosses(axes_of(mesh)), *mesh.get_coordinate()
    label = [IGNORED, 3][batch]
    found.add(torch.tensor(batch / 4), torch.tensor([[label, IGNORED]]), torch.tensor(1))
    assert found.largest() == pytest.approx(0.5)
    found.clear()
    found.add(torch.tensor(0.0), torch.tensor([[IGNORED]]), torch.tensor(0))
    assert math.isnan(found.largest())


def trainer_on(*, dp=1, cp=1):
    """As much of a trainer as counts tokens."""
    made = object.__new__(Trainer)
    made.parallel_dims = SimpleNamespace(dp_replicate=1, dp_shard=dp, cp=cp)
    made.metrics_processor = SimpleNamespace(count_from=lambda step: None)
    made.step, made.ntokens_seen = 7, 4096
    return made


@pytest.mark.parametrize(("dp", "cp"), [(1, 1), (1, 4), (2, 2), (8, 1)])
def test_tokens_seen_are_those_of_all_ranks_on_another_mesh(dp, cp):
    other = trainer_on(dp=dp, cp=cp)
    other.load_state_dict(trainer_on(cp=2).state_dict())
    assert other.ntokens_seen * dp * cp == 2 * 4096 and other.resumed_step == 7


def test_tokens_seen_of_an_earlier_version_are_those_of_a_rank():
    other = trainer_on(cp=2)
    other.load_state_dict({"step": 9, "ntokens_seen": 512})
    assert other.ntokens_seen == 512
