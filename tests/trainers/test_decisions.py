"""What a callback decides on one rank alone holds on all of them."""

from types import SimpleNamespace

import pytest
import torch
from torch import distributed as dist
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl
from transformers.trainer_callback import CallbackHandler
from transformers.trainer_utils import EvalLoopOutput

from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.trainers.decisions import DECISIONS, SharedDecisions, share_callbacks
from tests.harness.spmd import spmd


class OnLastRank(TrainerCallback):
    """As one that hears a signal which reached its host only."""

    def __init__(self, event, decision):
        setattr(self, event, self.decide)
        self.decision = decision

    def decide(self, args, state, control, **_):
        setattr(control, self.decision, dist.get_rank() == dist.get_world_size() - 1)


@pytest.mark.parametrize("decision", DECISIONS)
@spmd(ranks=2)
def test_what_a_callback_decides_on_one_rank_holds_on_all(mesh, decision):
    """Where a Trainer reads it next: else a rank saves, evaluates or stops by itself."""
    on = ParallelMesh.from_degrees(Degrees(cp=2), "cpu")
    for event in ("on_substep_end", "on_step_end", "on_epoch_end", "on_save"):
        handler = CallbackHandler([OnLastRank(event, decision)], None, None, None, None)
        share_callbacks(handler, on, torch.device("cpu"))
        decided = getattr(handler, event)(None, None, TrainerControl())
        assert [name for name in DECISIONS if getattr(decided, name)] == [decision]


class Loop:
    """What a Trainer measures and logs, whose numbers and callbacks may differ by rank."""

    def evaluation_loop(self, dataloader):
        return EvalLoopOutput(None, None, {"eval_score": float(dist.get_rank())}, 1)

    def log(self, logs, start_time=None):
        self.control.should_evaluate = dist.get_rank() == 1

    def hyperparameter_search(self, hp_space=None, n_trials=20, backend=None, **kwargs):
        return n_trials

    def _maybe_log_save_evaluate(self, loss):
        if self.control.should_log:
            self.log({"loss": loss}, 0.0)
        self.evaluates = self.control.should_evaluate


class SharedLoop(SharedDecisions, Loop):
    def __init__(self):
        self.mesh = ParallelMesh.from_degrees(Degrees(dp_shard=2), "cpu")
        self.args = SimpleNamespace(device=torch.device("cpu"))
        self.control = TrainerControl()


class LogsItsOwn(SharedLoop):
    """A trainer of one's own, which keeps to itself when a step began."""

    def log(self, logs, *_):
        super().log({**logs, "own": 1.0})


@spmd(ranks=2)
def test_metrics_of_the_first_rank_are_those_of_all(mesh):
    """They choose the best checkpoint, a learning rate, and the end of training."""
    assert SharedLoop().evaluation_loop(DataLoader([1, 2])).metrics == {"eval_score": 0.0}


@spmd(ranks=2)
def test_data_sets_of_unequal_length_are_refused_on_all_ranks(mesh):
    """One rank would train or evaluate on, and wait for the other."""
    rows = DataLoader([1, 2, 3][: 3 - dist.get_rank()], batch_size=2)
    with pytest.raises(ValueError, match=r"got 2 rows in 1 batches on rank 1 and 3 in 2 on rank 0"):
        SharedLoop().evaluation_loop(rows)
    with pytest.raises(ValueError, match=r"the same data set, .* give all of them all rows"):
        SharedLoop().set_initial_training_values(None, rows)


@spmd(ranks=2)
def test_what_is_decided_as_a_step_is_logged_holds_on_all_ranks(mesh):
    """And what one rank logs by itself waits for nobody."""
    for kind in (SharedLoop, LogsItsOwn):
        loop = kind()
        if dist.get_rank() == 0:
            loop.log({"of the first rank": 1.0})
        assert not loop.control.should_evaluate
        for loop.control.should_log in (False, True):
            loop._maybe_log_save_evaluate(1.0)
            assert loop.evaluates == loop.control.should_log
            assert "log" not in vars(loop)


@spmd(ranks=2)
def test_a_search_whose_trials_the_first_rank_would_end_is_refused(mesh):
    """optuna prunes where nobody asks it not to: other ranks would wait in the next step."""
    search = SharedLoop().hyperparameter_search
    whole = {"pruner": NopPruner(), "direction": "minimize"}
    assert search(None, 3, **whole) == search(None, 3, "optuna", **whole) == 3
    for given, match in (
        ({}, "pruner=NoneType, .*: pass optuna.pruners.NopPruner"),
        ({**whole, "timeout": 60}, "timeout=60, by which the first rank"),
        ({**whole, "backend": "ray"}, "backend=ray, .*: take optuna"),
    ):
        with pytest.raises(ValueError, match=match):
            search(None, 3, **given)


class NopPruner:
    """As optuna's is called, which is not installed here."""
