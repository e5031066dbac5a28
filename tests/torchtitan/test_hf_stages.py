"""Pipeline stages of models of transformers, held against the unmodified model on one device.

That runs each document of the rows by itself, in fp64; stages are cut, sharded and run as train.py
has it.
"""

import math
import tempfile
from contextlib import nullcontext

from dtcp.torchtitan.hf_model import huggingface_spec, read_config

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close
from torchtitan.distributed.activation_checkpoint import FullAC
from transformers import AutoModelForCausalLM

from dtcp.check.true_fp64 import TrueFP64
from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.huggingface import stage_cut
from dtcp.huggingface.small_config import small_config
from dtcp.loss import global_token_count
from dtcp.microbatches import run_forward, step_microbatches
from dtcp.parallelize import parallelize_hf, save_hf
from dtcp.parallelize.load_hf import fill_hf
from tests.harness.parity import SEQ_LEN, gradients
from tests.harness.spmd import spmd
from tests.torchtitan.test_stages import ROWS, Staged, assert_trains_as_one_weight, parallelism_of

VOCABULARY = 64


def source_of(kind: str, folder: str, **fields: object) -> str:
    """A small config of five layers, in a file."""
    change = {"vocab_size": VOCABULARY, "num_hidden_layers": 5, **fields}
    config = small_config(kind, change).config
    config.save_pretrained(folder)
    read_config(folder + "/config.json")._experts_implementation = "eager"  # others have no fp64
    return folder + "/config.json"


def plain_model(source: str):
    """With weights that no rule of the family draws: none is 0 or 1."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(read_config(source), attn_implementation="eager")
    model = model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def one_device(model, rows, ids: torch.Tensor) -> torch.Tensor:
    """The mean loss of all tokens that another one follows in their document, and gradients."""
    losses = []
    for row, lengths in zip(ids, rows, strict=True):
        for tokens in row[: sum(lengths)].split(lengths):
            logits = model(input_ids=tokens[None], use_cache=False).logits[0]
            losses.append(F.cross_entropy(logits[:-1], tokens[1:], reduction="none"))
    loss = torch.cat(losses).mean()
    loss.backward()
    return loss.detach()


class StagedHF(Staged):
    def load(self, weights: dict[str, torch.Tensor]) -> None:
        for part in self.parts:
            part.to_empty(device="cpu")
            part.init_weights(buffer_device=None)
            fill_hf(part, weights)  # copies stay as they are


def assert_equals_one_device(kind: str, schedule: str, degrees: dict, options: dict) -> None:
    how = {key: x for key, x in options.items() if key in ("compile", "ac")}
    fields = {key: x for key, x in options.items() if key not in how}
    world = 2 * math.prod(degrees.values()) if len(degrees) > 1 else 4
    with tempfile.TemporaryDirectory() as folder:
        spec = huggingface_spec(source_of(kind, folder, **fields))
        staged = StagedHF(parallelism_of(schedule, **{"pp": 2} | degrees), world, spec=spec, **how)
        # Neither graphs nor recomputation have room for what casts to fp64 where a model says fp32.
        with nullcontext() if how else TrueFP64():
            assert_trains(staged, plain_model(spec.model.source))


def assert_trains(staged: StagedHF, reference) -> None:
    """One step; or three of an optimizer, where stages share a weight."""
    if staged.parts[0].stage.copied:
        assert_trains_as_one_weight(staged, reference, one_device)
        return
    staged.load(reference.state_dict())
    torch.manual_seed(1)
    ids = torch.randint(VOCABULARY, (len(ROWS), SEQ_LEN))
    expected = one_device(reference, ROWS, ids)
    inputs = staged.inputs(ids)
    tokens = sum(global_token_count(x, staged.mesh.loss) for x in inputs["target_mbs"])
    assert_close(staged.loss(run_forward(staged.schedule, **inputs)) / tokens, expected)
    loss_kwargs = {"global_valid_tokens": torch.as_tensor(tokens)}
    shares = step_microbatches(staged.schedule, **inputs, loss_kwargs=loss_kwargs)
    assert_close(staged.loss(shares), expected)
    own = {name: g for part in staged.parts for name, g in gradients(part).items()}
    of_all = gradients(reference)
    names = {name for part in staged.parts for name, _ in part.named_parameters()}
    assert own.keys() == names & of_all.keys()
    for name, gradient in own.items():
        assert_close(gradient.reshape(of_all[name].shape), of_all[name])


TIED = {"tie_word_embeddings": True}
CASES = {
    "llama on cp": ("llama", "1F1B", {"cp": 2}, {}),
    "llama, compiled": ("llama", "Interleaved1F1B", {"cp": 2}, {"compile": True}),
    "qwen2, recomputed": ("qwen2", "Interleaved1F1B", {}, {"ac": FullAC.Config()}),
    "qwen3 on tp": ("qwen3", "1F1B", {"tp": 2}, TIED),
    # A width whose root, by which it scales embeddings, is the same in fp32.
    "gemma3_text on cp": ("gemma3_text", "Interleaved1F1B", {"cp": 2}, {"hidden_size": 64}),
    "mixtral on dp": ("mixtral", "GPipe", {}, {}),
    "gpt_oss on cp": ("gpt_oss", "1F1B", {"cp": 2}, {}),
    "glm4 on tp": ("glm4", "1F1B", {"tp": 2}, {}),
    "an end without a layer": ("llama", "1F1B", {"pp": 4}, {}),
}


@pytest.mark.parametrize("case", CASES)
@spmd(ranks=4)
def test_stages_have_the_loss_and_gradients_of_the_unmodified_model(mesh, case):
    assert_equals_one_device(*CASES[case])


@spmd(ranks=8)
@pytest.mark.slow
def test_so_they_have_on_three_axes(mesh):
    assert_equals_one_device("qwen3", "1F1B", {"cp": 2, "tp": 2}, TIED)


@spmd(ranks=2)
def test_a_stage_of_another_model_is_refused_and_one_that_is_saved_alone(mesh):
    mesh = ParallelMesh.from_degrees(Degrees(pp=2), "cpu")
    models = [
        AutoModelForCausalLM.from_config(small_config("llama", {"num_hidden_layers": n}).config)
        for n in (2, 3)
    ]
    stage = stage_cut(models[0]).stage(range(1))
    with pytest.raises(ValueError, match=r"got 3 in .* and a stage of 2 layers in model.layers"):
        parallelize_hf(models[1], mesh, stage=stage)
    with pytest.raises(ValueError, match=r"parallelize_hf runs all layers .* got .*pp=2"):
        parallelize_hf(models[0], mesh)
    stage = parallelize_hf(models[0], mesh, stage=stage)
    with pytest.raises(ValueError, match=r"weights of all stages, got one .* and pp=None"):
        save_hf(stage, "nowhere")


@spmd(ranks=2)
def test_a_weight_that_two_stages_would_train_apart_is_refused(mesh):
    with tempfile.TemporaryDirectory() as folder:
        spec = huggingface_spec(source_of("qwen3", folder, **TIED))
        staged = StagedHF(parallelism_of(pp=2), 2, spec=spec)
        staged.load(plain_model(spec.model.source).state_dict())
    inputs = staged.inputs(torch.zeros(len(ROWS), SEQ_LEN, dtype=torch.int64))
    loss_kwargs = {"global_valid_tokens": torch.ones(())}
    with pytest.raises(ValueError, match=r"got lm_head.weight of stage 1, which is trained apart"):
        step_microbatches(staged.schedule, **inputs, loss_kwargs=loss_kwargs)
