"""Models of a mesh, saved as transformers would save them."""

import json
import shutil
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed as dist
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.testing import assert_close
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from dtcp.check.checked_hf import CheckedHuggingFaceModel
from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.huggingface.language_model import model_of
from dtcp.huggingface.small_config import small_config
from dtcp.parallelize import load_hf, parallelize_hf, save_hf
from dtcp.parallelize.hf_files import SavedGroup, saved_groups, weight_groups
from tests.harness.hf_models import build, config_of
from tests.harness.spmd import spmd


def in_a_folder(body):
    """Run the body on a folder that all ranks see."""
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder, src=0)
    body(Path(folder[0]))
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder[0])


def stored(folder):
    """Name -> shape and dtype of what a folder's files hold."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= {key: (tuple(x.shape), x.dtype) for key, x in load_file(path).items()}
    return found


def assert_saved(model, plain, folder, **options):
    """Assert that the folder holds what transformers writes, and that it loads it."""
    save_hf(model, folder / "ours", **options)
    plain.save_pretrained(folder / "theirs")
    assert stored(folder / "ours") == stored(folder / "theirs")
    input_ids = torch.arange(1, 10)[None]
    logits = []
    for each in ("ours", "theirs"):
        loaded = AutoModelForCausalLM.from_pretrained(folder / each, dtype=torch.float64)
        if hasattr(plain.config, "num_experts_per_tok"):
            loaded.set_experts_implementation("batched_mm")  # torch has no grouped one in fp64
        logits.append(loaded(input_ids).logits)
    assert torch.equal(*logits)
    ours, theirs = (
        json.loads((folder / each / "config.json").read_text()) for each in ("ours", "theirs")
    )
    assert ours == theirs


def test_saving_replaces_its_own_files_and_no_others(tmp_path):
    """Of an earlier save all parts go, for they would be read; what else lies there stays."""
    for name in ("model-00001-of-00009.safetensors", "model.safetensors", "model_ema.safetensors"):
        (tmp_path / name).write_text("before")
    save_hf(build("qwen3"), tmp_path)
    left = {path.name: path.read_bytes()[:6] for path in tmp_path.glob("*.safetensors")}
    assert left.keys() == {"model.safetensors", "model_ema.safetensors"}
    assert left["model_ema.safetensors"] == b"before" != left["model.safetensors"]


@pytest.mark.slow_where(lambda kind, degrees: degrees.tp > 1 or kind == "gpt_oss")
@pytest.mark.parametrize("degrees", [Degrees(cp=2), Degrees(tp=2)])
@pytest.mark.parametrize("kind", ["qwen3", "mixtral", "gpt_oss"])
@spmd(ranks=2)
def test_saved_model_is_what_transformers_writes_and_loads(mesh, kind, degrees):
    """Tied weights once; experts, which are one weight in the model, one by one."""

    def body(folder):
        plain, model = build(kind), build(kind)
        parallelize_hf(model, ParallelMesh.from_degrees(degrees, "cpu"))
        mine = folder if dist.get_rank() == 0 else Path(tempfile.mkdtemp())
        if dist.get_rank() == 0:
            assert_saved(model, plain, mine, shard_bytes=20_000)
            assert (mine / "ours" / "model.safetensors.index.json").exists()
        else:
            save_hf(model, mine / "ours")
            assert not (mine / "ours").exists()

    in_a_folder(body)


@spmd(ranks=1)
def test_rules_of_files_are_those_of_classes_that_fsdp_has_not_wrapped(mesh):
    """DeepSeek-V4's name weights from the root on: inside of the model they are others."""
    model = model_of(small_config("deepseek_v4", {}).config, "correct it")
    state = model.state_dict()
    right = revert_weight_conversion(model, dict(state))
    parallelize_hf(model, ParallelMesh.from_degrees(Degrees(), "cpu"))
    fully_shard(model, mesh=mesh)
    assert isinstance(model, FSDPModule)
    ours = [
        group.revert(model, {name: state[name] for name in group.names})
        for group in saved_groups(model, list(state))
    ]
    assert {name for weights in ours for name in weights} == set(right)
    groups, left_over = weight_groups(model, right)
    assert {group.target for group in groups} == set(state) and not left_over
    assert isinstance(model, FSDPModule)


@spmd(ranks=2)
def test_saved_hybrid_is_loaded_on_another_mesh(mesh):
    def body(folder):
        checked = CheckedHuggingFaceModel("qwen3_next")
        torch.manual_seed(0)
        model = checked.build()
        expected = {name: x.clone() for name, x in model.state_dict().items()}
        parallelize_hf(model, ParallelMesh.from_degrees(Degrees(cp=2), "cpu"))
        save_hf(model, folder)
        save_hf(model, folder, dtype=torch.bfloat16, shard_bytes=10_000)
        assert {dtype for _, dtype in stored(folder).values()} == {torch.bfloat16}
        save_hf(model, folder)
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
        assert_close(loaded.state_dict(), expected)

    in_a_folder(body)


@pytest.mark.slow
@spmd(ranks=2)
def test_saved_by_one_mesh_is_loaded_by_another(mesh):
    def body(folder):
        model = build("qwen3_moe")
        expected = {name: x.clone() for name, x in model.state_dict().items()}
        parallelize_hf(model, ParallelMesh.from_degrees(Degrees(cp=2), "cpu"))
        save_hf(model, folder / "first")
        with torch.device("meta"):
            other = AutoModelForCausalLM.from_config(config_of("qwen3_moe")).double()
        parallelize_hf(other, ParallelMesh.from_degrees(Degrees(tp=2), "cpu"))
        load_hf(other, folder / "first", device="cpu")
        save_hf(other, folder / "second")
        loaded = AutoModelForCausalLM.from_pretrained(folder / "second", dtype=torch.float64)
        assert_close(loaded.state_dict(), expected)

    in_a_folder(body)


@spmd(ranks=2)
def test_folder_that_cannot_be_written_is_refused_on_all_ranks(mesh):
    def body(folder):
        (folder / "file").write_text("no folder")
        model = build("llama")
        parallelize_hf(model, ParallelMesh.from_degrees(Degrees(cp=2), "cpu"))
        with pytest.raises(ValueError, match=r"the first rank can write, got .*Error"):
            save_hf(model, folder / "file")

    in_a_folder(body)


@spmd(ranks=2)
def test_weights_that_transformers_cannot_turn_back_end_all_ranks(mesh):
    """The first rank turns them alone, while the others wait for its part of the next ones."""

    def body(folder):
        model = parallelize_hf(build("llama"), ParallelMesh.from_degrees(Degrees(cp=2), "cpu"))
        failing = mock.patch.object(SavedGroup, "revert", side_effect=KeyError("no such expert"))
        with failing, pytest.raises(ValueError, match="KeyError: 'no such expert'"):
            save_hf(model, folder)

    in_a_folder(body)
