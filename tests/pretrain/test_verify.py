"""--dtcp.verify fails where a mesh computes something else, also where no loss shows it."""

import functools
from dataclasses import replace
from typing import Any

from torch import Tensor

from dtcp.pretrain.configs import llama_tiny_fsdp4
from dtcp.pretrain.trainer import Trainer
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
