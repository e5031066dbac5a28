"""What a policy's trainer on a mesh goes on from: random states, and which rows are asked for."""

import random
import warnings
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from transformers import Trainer
from trl import GRPOTrainer

from dtcp.trainers import MeshTrainerMixin
from dtcp.trainers.policy import PolicyRows


class Saved(MeshTrainerMixin, Trainer):
    """A rank of a mesh, with the arguments of one process or of several."""

    def __init__(self, processes, **ranks):
        self.mesh = SimpleNamespace(rank=lambda axis: ranks.get(axis, 0))
        self.args = SimpleNamespace(world_size=processes, process_index=processes - 1)


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
    Saved(4, batch=1, cp=1)._save_rng_state(str(tmp_path))  # writes nothing
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "rng_state_0.pth",
        "rng_state_1.pth",
    ]
    for each in (Saved(1), Saved(2, cp=1), Saved(4, tp=1)):
        each._load_rng_state(str(tmp_path))
        assert torch.rand(3).equal(expected[0])
        assert random.random() == expected[1]
        assert each.args.process_index == each.args.world_size - 1
    Saved(2, batch=1)._load_rng_state(str(tmp_path))
    assert torch.rand(3).equal(other)


class Resumed(PolicyRows, GRPOTrainer):
    def __init__(self):
        self.args = SimpleNamespace(steps_per_generation=4, process_index=0)
        self.num_iterations, self._step, self._buffered_inputs = 2, 3, [None]


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
