"""Stages of dtcp's models, as torchtitan's Trainer is given them: one device's loss and gradients.

The reference is the model whole, on one device in fp64 (tests/harness/parity.py); stages are cut,
sharded and run as train.py has it.
"""

import contextlib
import functools
from dataclasses import replace

from dtcp.torchtitan.compat import float64_by_name
from dtcp.torchtitan.loss import TokenLoss
from dtcp.torchtitan.model_spec import LLAMA, spec_of
from dtcp.torchtitan.section import Section
from dtcp.torchtitan.stage_forwards import LLAMA_STAGE
from dtcp.torchtitan.stages import _check_parts, layers_of_stages

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.testing import assert_close
from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.activation_checkpoint import FullAC
from torchtitan.distributed.pipeline_parallel import _generate_llm_fqn_per_model_part

from dtcp.batch import shard_batch
from dtcp.distributed.mesh import ParallelMesh
from dtcp.distributed.random_weights import WholeDraws
from dtcp.labels import shift_labels
from dtcp.loss import global_token_count
from dtcp.microbatches import run_forward, step_microbatches
from dtcp.models.llama import Llama
from dtcp.sequence.documents import Documents
from tests.harness import parity
from tests.harness.parity import SEQ_LEN, gradients, one_device, summed
from tests.harness.spmd import spmd

CONFIG = replace(parity.CONFIG, num_layers=5)
MICROBATCHES = (((9, 16, 6),), ((32,),), ((1, 20, 11),), ((5, 5, 5),))
"""Documents of four micro-batches of a row each."""
ROWS = tuple(row for rows in MICROBATCHES for row in rows)


def parallelism_of(schedule: str = "1F1B", **degrees: int) -> ParallelismConfig:
    named = {"cp": "context", "tp": "tensor", "pp": "pipeline"}
    given = {f"{named[axis]}_parallel_degree": degree for axis, degree in degrees.items()}
    return ParallelismConfig(
        spmd_backend="partial_dtensor", pipeline_parallel_schedule=schedule, **given
    )


class Staged:
    """This rank's stages of a small Llama in fp64, as torchtitan's Trainer would build them."""

    def __init__(self, parallelism: ParallelismConfig, world: int, *, compile=False, ac=None):
        self.dims = ParallelDims.from_config(parallelism, world)
        self.dims.build_mesh()
        self.mesh = ParallelMesh.from_parallel_dims(self.dims)
        spec, section = spec_of(LLAMA, "small", CONFIG), Section()
        training = TrainingConfig(
            local_batch_size=len(MICROBATCHES) // self.mesh.size("batch"),
            seq_len=SEQ_LEN,
            dtype="float64",
            mixed_precision_param="float64",
            mixed_precision_reduce="float64",
        )
        with torch.device("meta"):
            model = spec.model.build().double()
        torch.manual_seed(self.mesh.rank("pp"))  # as torchtitan seeds stages, each apart
        with float64_by_name():
            self.schedule, parts, *_ = spec.pipelining_fn(
                model,
                parallel_dims=self.dims,
                training=training,
                parallelism=parallelism,
                compile_config=CompileConfig(enable=compile, backend="aot_eager"),
                ac_config=ac,
                dump_folder="",
                device=torch.device("cpu"),
                model_config=spec.model,
                parallelize_fn=functools.partial(spec.parallelize_fn, section=section),
                loss_fn=TokenLoss(TokenLoss.Config()),
                section=section,
            )
        self.layout, self.parts = section.sequence_layout(), nn.ModuleList(parts)

    def inputs(self, ids: torch.Tensor) -> dict[str, list]:
        """What a step is given, each micro-batch sharded on its own."""
        inputs = {"arg_mbs": [], "kwarg_mbs": [], "target_mbs": []}
        rank, ranks = self.mesh.rank("batch"), self.mesh.size("batch")
        for row, rows in zip(ids[rank::ranks], MICROBATCHES[rank::ranks], strict=True):
            documents = Documents(rows, ids.shape[1])
            batch = {"input_ids": row[None], "position_ids": documents.position_ids()}
            batch["labels"] = shift_labels(row[None], documents)
            masks = self.parts[0].stage.masks
            how = {"model": self.parts, "documents": documents, "balance_for": masks}
            local, sharded = shard_batch(batch, self.mesh, self.layout, **how)
            inputs["arg_mbs"].append((local["input_ids"],))
            read = {"attn_metadata": sharded.attn_metadata}
            inputs["kwarg_mbs"].append({"position_ids": local["position_ids"], **read})
            inputs["target_mbs"].append(local["labels"])
        return inputs

    def loss(self, shares: list[torch.Tensor]) -> torch.Tensor:
        """Of all ranks, on every one of them."""
        own = sum(shares, torch.zeros((), dtype=torch.float64))
        torch.distributed.all_reduce(own, group=self.mesh.pp.get_group())
        return summed(own, self.mesh)


def assert_equals_one_device(staged: Staged) -> None:
    """Loss and gradients of steps that follow a validation."""
    torch.manual_seed(0)
    reference = Llama(CONFIG).double()
    for part in staged.parts:
        part.to_empty(device="cpu")
        own = {name: x for name, x in reference.state_dict().items() if name in part.state_dict()}
        set_model_state_dict(part, own, options=StateDictOptions(full_state_dict=True))
    torch.manual_seed(1)
    expected = one_device(reference, ROWS)
    torch.manual_seed(1)
    inputs = staged.inputs(torch.randint(CONFIG.vocab_size, (len(ROWS), SEQ_LEN)))
    tokens = sum(global_token_count(x, staged.mesh.loss) for x in inputs["target_mbs"])
    of_all = gradients(reference)
    for steps in (2, 1):  # whose gradients add up
        assert_close(staged.loss(run_forward(staged.schedule, **inputs)) / tokens, expected)
        for _ in range(steps):
            loss_kwargs = {"global_valid_tokens": torch.as_tensor(tokens)}
            shares = step_microbatches(staged.schedule, **inputs, loss_kwargs=loss_kwargs)
            assert_close(staged.loss(shares), expected)
        named = [part.named_parameters() for part in staged.parts]
        sums = {name: steps * of_all[name] for each in named for name, _ in each}
        assert_close({k: g for part in staged.parts for k, g in gradients(part).items()}, sums)
        with pytest.raises(ValueError, match=r"got a gradient of .* which torch would drop"):
            run_forward(staged.schedule, **inputs)
        staged.parts.zero_grad()


CASES = {
    "cp": ("1F1B", {"cp": 2}, {}),
    "gpipe": ("GPipe", {"cp": 2}, {}),
    "interleaved": ("Interleaved1F1B", {"cp": 2}, {}),
    "compiled": ("Interleaved1F1B", {"cp": 2}, {"compile": True}),
    "recomputed": ("1F1B", {"cp": 2}, {"ac": FullAC.Config()}),
    "tp": ("1F1B", {"tp": 2}, {}),
    "dp": ("GPipe", {}, {}),
    "an end without a layer": ("1F1B", {"pp": 4}, {}),
}


@pytest.mark.parametrize("case", CASES)
@spmd(ranks=4)
def test_loss_and_gradients_are_those_of_one_device(mesh, case):
    schedule, degrees, how = CASES[case]
    assert_equals_one_device(Staged(parallelism_of(schedule, **{"pp": 2} | degrees), 4, **how))


@spmd(ranks=8)
@pytest.mark.slow
def test_so_they_are_on_three_axes(mesh):
    assert_equals_one_device(Staged(parallelism_of(pp=2, cp=2, tp=2), 8))


@spmd(ranks=4)
def test_stages_draw_the_weights_of_one_device(mesh):
    torch.manual_seed(0)
    reference = spec_of(LLAMA, "small", CONFIG).model.build().double()
    torch.manual_seed(0)
    reference.init_weights(buffer_device=None)
    staged = Staged(parallelism_of("Interleaved1F1B", pp=2, tp=2), 4)

    for part in staged.parts:
        part.to_empty(device="cpu")
        with torch.no_grad(), WholeDraws():
            part.init_weights(buffer_device=None)
        for name, x in part.named_parameters():
            whole = x.full_tensor() if hasattr(x, "full_tensor") else x
            assert_close(whole, reference.get_parameter(name), rtol=0, atol=0)


def test_a_weight_of_two_stages_or_of_none_is_refused():
    with torch.device("meta"):
        model = Llama(CONFIG)
        _check_parts(model, LLAMA_STAGE)
        with pytest.raises(
            ValueError, match=r"'embedding.weight', 'lm_head.weight'.* several have"
        ):
            _check_parts(Llama(replace(CONFIG, tied=True)), LLAMA_STAGE)
        model.further = nn.Linear(2, 2)
        with pytest.raises(ValueError, match=r"got further.weight of Llama, which none has"):
            _check_parts(model, LLAMA_STAGE)


def test_layers_are_cut_as_torchtitan_cuts_them():
    for stages in range(2, 7):
        for layers in range(1, 14):
            for first, last in ((1, 1), (0, 0), (2, 1), (0, 2)):
                parallelism = ParallelismConfig(
                    pipeline_parallel_degree=stages,
                    pipeline_parallel_first_stage_less_layers=first,
                    pipeline_parallel_last_stage_less_layers=last,
                )
                arguments = (stages, layers, first, last)
                with contextlib.suppress(ValueError):  # of more stages than we refuse
                    theirs = _generate_llm_fqn_per_model_part(*arguments)
                    own = layers_of_stages(parallelism, layers)
                    named = [[f"layers.{i}" for i in each] for each in own]
                    assert named == [[x for x in part if "layers" in x] for part in theirs]
