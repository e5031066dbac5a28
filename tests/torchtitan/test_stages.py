"""Stages of dtcp's models, as torchtitan's Trainer is given them: one device's loss and gradients.

The reference is the model whole, on one device in fp64 (tests/harness/parity.py); stages are cut,
sharded and run as train.py has it.
"""

import contextlib
import functools
from dataclasses import replace

from dtcp.torchtitan.compat import float64_by_name
from dtcp.torchtitan.loss import TokenLoss
from dtcp.torchtitan.model_spec import spec_of
from dtcp.torchtitan.section import Section
from dtcp.torchtitan.stage_forwards import FAMILY_STAGES
from dtcp.torchtitan.stages import _check_parts, layers_of_stages

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.tensor import DTensor
from torch.testing import assert_close
from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.activation_checkpoint import FullAC
from torchtitan.distributed.pipeline_parallel import _generate_llm_fqn_per_model_part
from torchtitan.distributed.utils import clip_grad_norm_

from dtcp.copied_weights import COPIES_OP, CopiedWeights
from dtcp.distributed.ledger import count_traffic
from dtcp.distributed.mesh import ParallelMesh
from dtcp.distributed.random_weights import WholeDraws
from dtcp.labels import look_ahead, shift_labels
from dtcp.loss import global_token_count, mtp_loss
from dtcp.microbatches import run_forward, step_microbatches
from dtcp.mixer_metadata import batch_metadata
from dtcp.models import qwen3_5
from dtcp.models.llama import Llama
from dtcp.models.qwen3_5 import Qwen35
from dtcp.parallelize.plans.families import LLAMA, QWEN3_5
from dtcp.pretrain.batches import BatchPreparation
from dtcp.sequence.documents import Documents
from tests.harness import parity
from tests.harness.parity import SEQ_LEN, Rows, gradients, one_device, summed
from tests.harness.spmd import spmd

CONFIG = replace(parity.CONFIG, num_layers=5)
TIED_CONFIG = replace(CONFIG, tied=True)
AHEAD_CONFIG = replace(
    qwen3_5.tiny(CONFIG.vocab_size),
    dim=32,
    num_layers=2,
    full_attention_every=2,
    feed_forward=48,
    num_mtp_layers=1,
)
LR, MAX_NORM = 1e-2, 0.05
MICROBATCHES = (((9, 16, 6),), ((32,),), ((1, 20, 11),), ((5, 5, 5),))
"""Documents of four micro-batches of a row each."""
ROWS = tuple(row for rows in MICROBATCHES for row in rows)


def whole_of(x: torch.Tensor) -> torch.Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def parallelism_of(schedule: str = "1F1B", **degrees: int) -> ParallelismConfig:
    named = {"cp": "context", "tp": "tensor", "pp": "pipeline"}
    given = {f"{named[axis]}_parallel_degree": degree for axis, degree in degrees.items()}
    return ParallelismConfig(
        spmd_backend="partial_dtensor", pipeline_parallel_schedule=schedule, **given
    )


class Staged:
    """This rank's stages of a small model in fp64, as torchtitan's Trainer would build them."""

    def __init__(
        self,
        parallelism: ParallelismConfig,
        world: int,
        *,
        family=LLAMA,
        config=CONFIG,
        spec=None,
        compile=False,
        ac=None,
    ):
        self.dims = ParallelDims.from_config(parallelism, world)
        self.dims.build_mesh()
        self.mesh = ParallelMesh.from_parallel_dims(self.dims)
        spec, section = spec or spec_of(family, "small", config), Section()
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
        self.parts = nn.ModuleList(parts)

    def inputs(self, ids: torch.Tensor) -> dict[str, list]:
        """What a step is given, each micro-batch sharded on its own."""
        inputs = {"arg_mbs": [], "kwarg_mbs": [], "target_mbs": []}
        rank, ranks = self.mesh.rank("batch"), self.mesh.size("batch")
        preparation = BatchPreparation(self.mesh, Section(), self.parts, training=True)
        for row, rows in zip(ids[rank::ranks], MICROBATCHES[rank::ranks], strict=True):
            documents = Documents(rows, ids.shape[1])
            batch = {"input": row[None], "positions": documents.position_ids()}
            labels = shift_labels(row[None], documents)
            local = preparation.local(batch | {"documents": documents}, labels, labels.device)
            inputs["arg_mbs"].append((local[0],))
            inputs["kwarg_mbs"].append(local[2])
            inputs["target_mbs"].append(local[1])
        return inputs

    def load(self, weights: dict[str, torch.Tensor]) -> None:
        """Give every stage its own of the whole model's weights."""
        for part in self.parts:
            part.to_empty(device="cpu")
            with torch.no_grad(), WholeDraws():
                part.init_weights(buffer_device=None)  # which ties what it has twice
            own = {name: x for name, x in weights.items() if name in part.state_dict()}
            set_model_state_dict(part, own, options=StateDictOptions(full_state_dict=True))

    def loss(self, shares: list[torch.Tensor]) -> torch.Tensor:
        """Of all ranks, on every one of them."""
        own = sum(shares, torch.zeros((), dtype=torch.float64))
        torch.distributed.all_reduce(own, group=self.mesh.pp.get_group())
        return summed(own, self.mesh)


def assert_equals_one_device(staged: Staged) -> None:
    """Loss and gradients of steps that follow a validation."""
    torch.manual_seed(0)
    reference = Llama(CONFIG).double()
    staged.load(reference.state_dict())
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


def one_device_ahead(model: Qwen35, rows: Rows, input_ids: torch.Tensor) -> None:
    """Fills the gradients of a model that predicts further ahead."""
    documents = Documents(rows, SEQ_LEN)
    labels = shift_labels(input_ids, documents)
    further = look_ahead(input_ids, labels, documents, depths=1)
    metadata = batch_metadata(model, documents)
    logits = model(input_ids, documents.position_ids(), metadata, further["mtp_input_ids"])
    tokens = global_token_count(labels, None)
    mtp_loss(logits, labels, further["mtp_labels"], tokens).backward()


def assert_trains_as_one_weight(staged: Staged, reference: nn.Module, fill=one_device) -> None:
    """Three clipped steps, from copies that are others at first.

    Args:
        fill: what fills the gradients of the reference.
    """
    staged.load(reference.state_dict())
    trained = [x for x in staged.parts.parameters() if x.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR)
    expected = torch.optim.AdamW(reference.parameters(), lr=LR)
    copied = CopiedWeights(staged.schedule, staged.parts[0].stage.copied)
    for copy in copied.copies():
        copy.mul_(3.0).requires_grad_()  # stands for other values, until the first refresh
    copied.refresh()
    torch.manual_seed(1)
    for _ in range(3):
        ids = torch.randint(CONFIG.vocab_size, (len(ROWS), SEQ_LEN))
        expected.zero_grad()
        fill(reference, ROWS, ids)
        norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), MAX_NORM)
        expected.step()
        inputs = staged.inputs(ids)
        main = [x.view(1, -1, x.shape[-1])[:, 0] for x in inputs["target_mbs"]]
        tokens = sum(global_token_count(x, staged.mesh.loss) for x in main)
        loss_kwargs = {"global_valid_tokens": torch.as_tensor(tokens)}
        step_microbatches(staged.schedule, **inputs, loss_kwargs=loss_kwargs)
        with count_traffic() as traffic:
            copied.add_gradients()
            pp = staged.mesh.pp
            own = clip_grad_norm_(list(staged.parts.parameters()), MAX_NORM, pp_mesh=pp)
            optimizer.step()
            optimizer.zero_grad()
            copied.refresh()
        assert_close(own, norm)
        assert norm > 2 * MAX_NORM
        weights = reference.state_dict()
        for part in staged.parts:
            for name, x in part.named_parameters(remove_duplicate=False):
                assert_close(whole_of(x.detach()), weights[name])
        assert traffic[COPIES_OP].sent == traffic[COPIES_OP].received == copied.bytes_per_step


TIED = {
    "cp": ("1F1B", {"cp": 2}, {}),
    "tp": ("1F1B", {"tp": 2}, {}),
    "dp": ("GPipe", {}, {}),
    "interleaved": ("Interleaved1F1B", {"cp": 2}, {"ac": FullAC.Config()}),
}


@pytest.mark.parametrize("case", TIED)
@spmd(ranks=4)
def test_a_head_tied_to_the_first_stages_embedding_is_trained_as_one_weight(mesh, case):
    schedule, degrees, how = TIED[case]
    parallelism = parallelism_of(schedule, pp=2, **degrees)
    staged = Staged(parallelism, 4, config=TIED_CONFIG, **how)
    torch.manual_seed(0)
    assert_trains_as_one_weight(staged, Llama(TIED_CONFIG).double())


@spmd(ranks=8)
@pytest.mark.slow
def test_so_is_it_on_three_axes(mesh):
    staged = Staged(parallelism_of(pp=2, cp=2, tp=2), 8, config=TIED_CONFIG)
    torch.manual_seed(0)
    assert_trains_as_one_weight(staged, Llama(TIED_CONFIG).double())


AHEAD = {
    "cp": ("1F1B", {"cp": 2}, False),
    "tied": ("1F1B", {"cp": 2}, True),
    "tied, tp": ("1F1B", {"tp": 2}, True),
    "interleaved": ("Interleaved1F1B", {}, False),
    "tied, of one rank each": ("1F1B", {"pp": 4}, True),
}


@pytest.mark.parametrize("case", AHEAD)
@spmd(ranks=4)
def test_what_predicts_further_ahead_trains_the_first_stages_embedding(mesh, case):
    schedule, degrees, tied = AHEAD[case]
    config = replace(AHEAD_CONFIG, tied=tied)
    parallelism = parallelism_of(schedule, **{"pp": 2} | degrees)
    staged = Staged(parallelism, 4, family=QWEN3_5, config=config)
    torch.manual_seed(0)
    reference = Qwen35(config).double()
    reference.init_weights(std=0.1)
    assert_trains_as_one_weight(staged, reference, one_device_ahead)


@pytest.mark.parametrize(("tied", "together"), [(False, True), (True, True), (True, False)])
@spmd(ranks=4)
def test_stages_draw_the_weights_of_one_device(mesh, tied, together):
    """On accelerators stages draw by themselves, and copies are made equal later."""
    torch.manual_seed(0)
    config = TIED_CONFIG if tied else CONFIG
    reference = spec_of(LLAMA, "small", config).model.build().double()
    torch.manual_seed(0)
    reference.init_weights(buffer_device=None)
    staged = Staged(parallelism_of("Interleaved1F1B", pp=2, tp=2), 4, config=config)
    if not together:
        for part in staged.parts:
            part.stage = replace(part.stage, random=None)
            part.init_weights = functools.partial(part.stage.init_weights, part)

    for part in staged.parts:
        part.to_empty(device="cpu")
        with torch.no_grad(), WholeDraws():
            part.init_weights(buffer_device=None)
        for name, x in part.named_parameters():
            assert x.requires_grad == (name != "lm_head.weight" or not tied)
            if together:
                assert_close(whole_of(x), reference.get_parameter(name), rtol=0, atol=0)
        assert (part.embedding is None) == (part.stage.index > 0)
        assert (part.lm_head is None) == (part.stage.index < 3)


def test_a_weight_of_no_stage_or_of_several_layers_is_refused():
    with torch.device("meta"):
        model = Llama(TIED_CONFIG)
        _check_parts(model, FAMILY_STAGES[LLAMA])
        model.further = nn.Linear(2, 2)
        with pytest.raises(ValueError, match=r"got further.weight of Llama, which is not"):
            _check_parts(model, FAMILY_STAGES[LLAMA])
        model = Llama(CONFIG)
        model.layers[3].attention_norm.weight = model.layers[0].attention_norm.weight
        with pytest.raises(ValueError, match=r"got layers.0.attention_norm.weight of Llama"):
            _check_parts(model, FAMILY_STAGES[LLAMA])


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
