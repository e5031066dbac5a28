"""Files of Qwen4, whose tables of n-grams are of many parts there."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed as dist
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from dtcp import causal_lm_loss
from dtcp.check.parity import seeded
from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.parallelize import load_hf, parallelize_hf, save_hf
from tests.harness.spmd import spmd
from tests.huggingface.test_picked_blocks import CHECKED
from tests.huggingface.test_save_hf import in_a_folder

TABLE = "model.layers.0.ple.ple_embedding.ngram_embedding"
IDS = torch.arange(1, 33)[None]
DEGREES = [Degrees(cp=2), Degrees(tp=2), Degrees(dp_shard=2)]


def contents(folder):
    return {k: x for path in folder.glob("*.safetensors") for k, x in load_file(path).items()}


@pytest.mark.slow_where(lambda degrees: degrees.tp == 1)
@pytest.mark.parametrize("degrees", DEGREES)
@spmd(ranks=2)
def test_model_with_ngrams_goes_into_files_of_transformers_and_out(mesh, degrees):
    """Saved from a mesh as transformers saves it, and loaded from that on the meta device."""

    def body(folder):
        plain = seeded(CHECKED)
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(copy.deepcopy(plain.config)).double()
        parallel_mesh = ParallelMesh.from_degrees(degrees, "cpu")
        model = parallelize_hf(seeded(CHECKED), parallel_mesh)
        save_hf(model, folder / "ours")
        if dist.get_rank() == 0:
            plain.save_pretrained(folder / "theirs")
        dist.barrier()
        names = contents(folder / "ours")
        assert_close(names, contents(folder / "theirs"), rtol=0, atol=0)
        assert len([name for name in names if name.startswith(f"{TABLE}.shard_")]) > 1
        loaded = AutoModelForCausalLM.from_pretrained(folder / "ours", dtype=torch.float64)
        assert_close(loaded.state_dict(), plain.state_dict(), rtol=0, atol=0)
        parallelize_hf(empty, parallel_mesh)
        load_hf(empty, folder / "theirs", device="cpu")
        batch = {"input_ids": IDS, "labels": IDS}
        losses = [causal_lm_loss(each, batch, parallel_mesh) for each in (model, empty)]
        assert_close(*losses, rtol=0, atol=0)
        save_hf(empty, folder / "again")
        dist.barrier()
        assert_close(contents(folder / "again"), contents(folder / "theirs"), rtol=0, atol=0)

    in_a_folder(body)
