"""torchtitan's models under its backend spmd_types: the losses of one device, on every mesh."""

from dtcp.torchtitan.compat import fsdp_reads_annotations

import pytest
import torch
from torchtitan.models.common import Embedding

from dtcp.pretrain.adopt import adopt_model
from dtcp.pretrain.configs import titan_llama3_tiny
from dtcp.pretrain.trainer import Trainer
from tests.harness import titan_models
from tests.harness.train_run import trained

NEEDS_TYPES = pytest.mark.skipif(
    not fsdp_reads_annotations(), reason="FSDP reads what spmd_types writes from torch 2.14 on"
)


def llama3() -> Trainer.Config:
    config = titan_llama3_tiny()
    config.parallelism.spmd_backend = "spmd_types"
    config.parallelism.tensor_parallel_degree = 1
    config.training.seq_len, config.compile.enable = 128, False
    return config


def muse_glimmer() -> Trainer.Config:
    """Whose tensor parallelism torchtitan has under this backend alone."""
    config = llama3()
    spec = titan_models.small(titan_models.muse_glimmer)
    spec.model.vocab_size = spec.model.lm_head.out_features = config.model_spec.model.vocab_size
    for _, embedding, _, _ in spec.model.traverse(Embedding.Config):
        embedding.num_embeddings = spec.model.vocab_size
    config.model_spec = adopt_model(spec)
    return config


@pytest.mark.parametrize("config", [llama3, muse_glimmer])
def test_configs_of_this_file_build(config):
    """Of models whose tensor parallelism waits for another torch, too."""
    with torch.device("meta"):
        assert config().model_spec.model.build()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "axis"),
    [
        ("llama3", "data_parallel_shard"),
        ("muse_glimmer", "data_parallel_shard"),
        pytest.param("llama3", "tensor_parallel", marks=NEEDS_TYPES),
        pytest.param("muse_glimmer", "tensor_parallel", marks=NEEDS_TYPES),
    ],
)
def test_a_model_of_torchtitans_is_verified_on_cp_and_another_axis(model, axis, tmp_path):
    output = trained(
        *("--dtcp.verify", "2", "--dump_folder", str(tmp_path)),
        *(f"--parallelism.{axis}_degree", "2"),
        module="tests.torchtitan.test_spmd_types",
        config=model,
        ranks=4,
    )
    assert "the losses of 2 steps agree" in output
