"""What a policy's trainer on a mesh goes on from: random states, and which rows are asked for."""

import random
import re
import warnings
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from transformers import Trainer
from trl import GRPOTrainer

from dtcp.trainers import MeshTrainerMixin
from dtcp.trainers.policy import PolicyRows
from dtcp.trainers.saved import RANDOM_STATES
from tests.harness.run_script import run_forked


class Saved(MeshTrainerMixin, Trainer):
    """A rank of a mesh, with the arguments of one process or of several."""

    def __init__(self, processes, **ranks):
        self.mesh = SimpleNamespace(rank=lambda axis: ranks.get(axis, 0))
        self.args = SimpleNamespace(world_size=processes, process_index=processes - 1)
        self.accelerator = SimpleNamespace(wait_for_everyone=self.others_are_here)
        self.waited = 0

    def others_are_here(self):
        self.waited += 1


def test_random_states_are_those_of_batch_ranks_on_every_mesh(tmp_path):
    """transformers names a file by its process, and otherwise where there is one process."""
    torch.manual_seed(5)
    random.seed(6)
    Saved(1)._save_rng_state(str(tmp_path))
    expected = torch.rand(3), random.random()
    torch.manual_seed(7)
    Saved(4, batch=1)._save_rng_state(str(tmp_path))
    other = torch.rand(3)
    torch.manual_seed(8)
    beside = Saved(4, batch=1, cp=1)
    beside._save_rng_state(str(tmp_path))  # writes nothing, and waits for those that do
    assert beside.waited == 1
    files = ["rng_state_0.pth", "rng_state_1.pth"]
    assert sorted(file.name for file in (tmp_path / RANDOM_STATES).iterdir()) == files
    for each in (Saved(1), Saved(2, cp=1), Saved(4, tp=1)):
        each._load_rng_state(str(tmp_path))
        assert torch.rand(3).equal(expected[0])
        assert random.random() == expected[1]
        assert each.args.process_index == each.args.world_size - 1
    Saved(2, batch=1)._load_rng_state(str(tmp_path))
    assert torch.rand(3).equal(other)


@pytest.mark.parametrize("name", ["rng_state.pth", "rng_state_0.pth"])
def test_random_states_of_processes_are_not_taken_for_those_of_batch_ranks(tmp_path, name):
    """As checkpoints have them that no mesh, or one of an earlier version, has saved."""
    torch.save({}, tmp_path / name)
    state = torch.get_rng_state()
    with pytest.warns(UserWarning, match=rf"1 files of processes \({name}, .* not read"):
        Saved(1)._load_rng_state(str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Saved(2)._load_rng_state(str(tmp_path))  # said once, by the first
        (tmp_path / name).unlink()
        Saved(1)._load_rng_state(str(tmp_path))  # saved without any
    assert torch.get_rng_state().equal(state)


class AsksArguments(Trainer):
    """Reads arguments there that transformers does not."""

    def _save_rng_state(self, output_dir):
        self.saw = self.args.run_name, self.args.process_index

    def _load_rng_state(self, checkpoint):
        self.saw = self.args.run_name, self.args.process_index


class AsksBehind(Saved, AsksArguments):
    pass


def test_who_keeps_random_states_behind_the_mixin_sees_all_arguments(tmp_path):
    trainer = AsksBehind(4, batch=1)
    trainer.args.run_name = "own"
    for keep in (trainer._save_rng_state, trainer._load_rng_state):
        trainer.saw = None
        keep(str(tmp_path))
        assert trainer.saw == ("own", 1)
    assert trainer.args.process_index == 3


class Resumed(PolicyRows, GRPOTrainer):
    def __init__(self):
        self.args = SimpleNamespace(
            steps_per_generation=4, process_index=0, seed=3, generation_batch_size=8
        )
        self.num_iterations, self._step, self._buffered_inputs = 2, 3, [None]
        self.train_dataset, self.shuffle_dataset, self.num_generations = range(9), True, 4


def test_prompts_of_the_epochs_before_a_checkpoint_are_not_drawn_again():
    """TRL's sampler draws each epoch's from numbers that carry on, in a trainer that does."""
    sampler = Resumed()._get_train_sampler()
    epochs = [list(sampler) for _ in range(4)]
    assert len(set(map(tuple, epochs))) == 4
    for past in range(4):
        trainer = Resumed()
        sampler = trainer._get_train_sampler()
        with mock.patch.object(Trainer, "_init_training_state", return_value=(past, 0)):
            trainer._init_training_state()
        assert [list(sampler) for _ in epochs[past:]] == epochs[past:]


def test_steps_of_a_checkpoint_amid_rollouts_ask_for_new_ones_and_keep_their_rows():
    """TRL counts steps from the start: the next prompts' rows would be half passed."""
    passed = mock.patch.object(Trainer, "_init_training_state", return_value=(1, 16))
    with passed, warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer = Resumed()
        assert trainer._init_training_state(9, 9, 1, "checkpoint", None) == (1, 16)
        assert (trainer._step, trainer._buffered_inputs) == (16, None)
    passed = mock.patch.object(Trainer, "_init_training_state", return_value=(1, 18))
    with passed, pytest.warns(UserWarning, match="one of 2 micro-batches of 8 .* a multiple of 8"):
        Resumed()._init_training_state(9, 9, 1, "checkpoint", None)


@pytest.mark.slow
def test_policy_goes_on_in_its_second_epoch_as_an_uninterrupted_run_of_trls(tmp_path):
    """On cp ranks, and on one rank, from a checkpoint of cp ranks."""
    script, path = "tests/trainers/policies.py", str(tmp_path / "plain.pt")
    plain = run_forked(script, path, "plain", "whole", ranks=0)
    assert plain.code == 0, plain.errors[-3000:]
    for axes, ranks, cases in [("cp", 2, ["whole", "resumed"]), ("one", 1, ["resumed"])]:
        ended = run_forked(script, path, axes, *cases, ranks=ranks)
        assert ended.code == 0, ended.output[-3000:]
        assert re.findall(r"^(\w+): at most", ended.printed, re.M) == cases
