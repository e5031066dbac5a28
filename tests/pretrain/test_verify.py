"""--dtcp.verify fails where a mesh computes something else, also where no loss shows it."""

import functools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dtcp.pretrain.configs import llama_tiny_fsdp4
from dtcp.pretrain.trainer import Trainer
from dtcp.pretrain.verify import _compare_gradients
from tests.harness.train_run import train


def halved() -> Trainer.Config:
    """On a mesh, gradients of all but the head are half as large; AdamW steps as far."""
    config = llama_tiny_fsdp4()
    spec = config.model_spec
    halve = functools.partial(_halve, spec.parallelize_fn)
    config.model_spec = replace(spec, parallelize_fn=halve)
    config.compile.enable, config.training.seq_len = False, 64
    config.parallelism.data_parallel_shard_degree = 2
    return config


def _halve(parallelize: Any, model: Any, **options: Any) -> Any:
    model = parallelize(model, **options)
    model.norm.register_forward_hook(_half_as_steep)
    return model


def _half_as_steep(module: Any, args: Any, output: Tensor) -> Tensor:
    return (output + output.detach()) / 2


def test_never_silent_a_mesh_whose_gradients_are_too_small(tmp_path):
    code, output = train(
        *("--dtcp.verify", "1", "--dump_folder", str(tmp_path)),
        module="tests.pretrain.test_verify",
        config="halved",
    )
    assert code == 1 and "the losses of 1 steps agree" in output
    assert "more than 0.001, in the first gradient of" in output


@pytest.mark.parametrize("wrong", [math.nan, math.inf, 2.0])
def test_never_silent_a_gradient_that_is_no_number_differs(wrong):
    """Whatever comes behind it; and so do one of another shape, one too few, and none at all."""
    right = {name: torch.ones(3) for name in "abcd"}
    assert _compare_gradients(right, right) == 0
    for name in right:
        assert _compare_gradients({**right, name: torch.full((3,), wrong)}, right) == 1
    assert _compare_gradients({**right, "b": torch.ones(2)}, right) == 1
    assert _compare_gradients({name: right[name] for name in "abc"}, right) == 1
    assert _compare_gradients({}, {}) == 1
