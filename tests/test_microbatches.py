"""Stages of a pipeline, each with context parallelism inside: one device's loss and gradients."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)
from torch.testing import assert_close

from dtcp.batch import shard_batch
from dtcp.check import CheckOptions
from dtcp.compile import count_graphs
from dtcp.distributed.ledger import count_traffic
from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.experts.losses import RouterLoss
from dtcp.labels import shift_labels
from dtcp.loss import global_token_count, token_mean_loss
from dtcp.microbatches import step_microbatches
from dtcp.mixer_plan import matching
from dtcp.models.llama import Llama
from dtcp.parallelize import (
    FSDP,
    FullCheckpoint,
    NoCheckpoint,
    ParallelPlan,
    llama_plan,
    parallelize,
)
from dtcp.planner.setup import Setup
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import HeadTail
from dtcp.softmax import RingAttention
from tests.harness import parity
from tests.harness.parity import GRAPHS, SEQ_LEN, Rows, gradients, one_device, summed
from tests.harness.spmd import spmd

CONFIG = replace(parity.CONFIG, num_layers=4)
MICROBATCHES: tuple[Rows, ...] = (((9, 16, 6),), ((32,),), ((1, 20, 11),), ((5, 5, 5),))
"""Documents of four micro-batches of a row each."""
ROWS = tuple(row for rows in MICROBATCHES for row in rows)
KEEP_ALL = NoCheckpoint()
V_SHAPED = (ScheduleZBVZeroBubble, ScheduleDualPipeV)
CUT = (ScheduleInterleavedZeroBubble, *V_SHAPED)


class Stage(nn.Module):
    """Some layers of a Llama, under the names that the whole has for them."""

    def __init__(self, whole: Llama, index: int, stages: int) -> None:
        super().__init__()
        self.is_last = index == stages - 1
        of_each = CONFIG.num_layers // stages
        own = range(index * of_each, (index + 1) * of_each)
        self.layers = nn.ModuleDict({str(i): whole.layers[i] for i in own})
        self.embedding = whole.embedding if index == 0 else None
        if self.is_last:
            self.norm, self.lm_head = whole.norm, whole.lm_head

    def forward(self, x: Tensor, position_ids: Tensor, attn_metadata: object) -> Tensor:
        x = x if self.embedding is None else self.embedding(x)
        for layer in self.layers.values():
            x = layer(x, position_ids, attn_metadata)
        return self.lm_head(self.norm(x)) if self.is_last else x


def plan_of(stage: Stage, mesh: ParallelMesh) -> ParallelPlan:
    """What the whole's plan says of the modules that a stage has."""
    whole = llama_plan(CONFIG, mesh, RingAttention())
    names = {name for name, _ in stage.named_modules()}
    tp = {key: style for key, style in whole.tp.items() if matching(names, key)}
    return ParallelPlan(tp=tp, cp=whole.cp, blocks=whole.blocks)


class Pipeline:
    """This rank's stages of a small Llama, and a schedule around them."""

    def __init__(
        self, kind, degrees, compile=None, *, stages_of_rank=1, checkpoint=KEEP_ALL, **options
    ):
        torch.manual_seed(0)
        self.reference, whole = Llama(CONFIG).double(), Llama(CONFIG).double()
        whole.load_state_dict(self.reference.state_dict())
        self.mesh = mesh = ParallelMesh.from_degrees(degrees, "cpu")
        total, rank = degrees.pp * stages_of_rank, mesh.rank("pp")
        own = (rank, total - 1 - rank) if kind in V_SHAPED else range(rank, total, degrees.pp)
        self.parts = nn.ModuleList(Stage(whole, index, total) for index in own)
        how = {"compile": compile, "activation_checkpoint": checkpoint}
        for part in self.parts:
            fsdp = FSDP(reshard_after_forward=kind not in CUT)
            parallelize(part, mesh, plan_of(part, mesh), fsdp=fsdp, **how)
        stages = [
            PipelineStage(part, index, total, torch.device("cpu"), group=mesh.pp.get_group())
            for index, part in zip(own, self.parts, strict=True)
        ]
        options = {"loss_fn": token_mean_loss, "scale_grads": False, **options}
        given = stages if stages_of_rank > 1 else stages[0]
        self.schedule = kind(given, n_microbatches=len(MICROBATCHES), **options)

    def inputs(self, ids: Tensor) -> dict[str, list]:
        """What a step is given, each micro-batch sharded on its own."""
        inputs = {"arg_mbs": [], "kwarg_mbs": [], "target_mbs": []}
        for row, rows in zip(ids, MICROBATCHES, strict=True):
            documents = Documents(rows, ids.shape[1])
            batch = {"input_ids": row[None], "position_ids": documents.position_ids()}
            batch["labels"] = shift_labels(row[None], documents)
            local, sharded = shard_batch(
                batch, self.mesh, HeadTail, model=self.parts, documents=documents
            )
            inputs["arg_mbs"].append((local["input_ids"],))
            read = {"attn_metadata": sharded.attn_metadata}
            inputs["kwarg_mbs"].append({"position_ids": local["position_ids"], **read})
            inputs["target_mbs"].append(local["labels"])
        return inputs

    def step(self, inputs: dict[str, list]) -> Tensor | None:
        """The loss of all tokens, where the last stage is."""
        counts = [global_token_count(labels, self.mesh.loss) for labels in inputs["target_mbs"]]
        shares = step_microbatches(
            self.schedule, **inputs, loss_kwargs={"global_tokens": sum(counts)}
        )
        has_loss = any(part.is_last for part in self.parts)
        assert len(shares) == has_loss * len(MICROBATCHES)
        loss = summed(sum(shares, torch.zeros((), dtype=torch.float64)), self.mesh)
        return loss if has_loss else None

    def assert_equals_one_device(self) -> None:
        torch.manual_seed(1)
        expected = one_device(self.reference, ROWS)
        torch.manual_seed(1)
        actual = self.step(self.inputs(torch.randint(CONFIG.vocab_size, (len(ROWS), SEQ_LEN))))
        if actual is not None:
            assert_close(actual, expected)
        of_all = gradients(self.reference)
        named = [part.named_parameters() for part in self.parts]
        expected = {name: of_all[name] for each in named for name, _ in each}
        assert_close({k: g for part in self.parts for k, g in gradients(part).items()}, expected)


PP_AND_CP = Degrees(pp=2, cp=2)


@pytest.mark.parametrize(
    "use",
    [CheckOptions, lambda degrees: Setup(degrees, Documents.single(1, 8))],
    ids=["check", "plan"],
)
def test_whole_models_are_refused_on_ranks_of_stages(use):
    with pytest.raises(ValueError, match=r"all layers .* got pp=2 \* .*cp=2.*: set pp to 1"):
        use(PP_AND_CP)


@spmd(ranks=4)
def test_stages_equal_one_device(mesh):
    """In the first step, too, which finds out shapes by a run of its own."""
    pipeline = Pipeline(Schedule1F1B, PP_AND_CP)
    pipeline.assert_equals_one_device()
    ids = torch.randint(CONFIG.vocab_size, (len(ROWS), SEQ_LEN))
    inputs = pipeline.inputs(ids)
    with count_traffic() as traffic:
        pipeline.step(inputs)
    layers = CONFIG.num_layers // 2
    assert traffic["dtcp::ring_attention"].calls == layers * len(MICROBATCHES)
    # The ranks of stages read the same rows, too, and mixers of their own.
    with pytest.raises(ValueError, match=r"cp, tp and pp group .* pp rank 1 has other token ids"):
        pipeline.inputs(ids ^ pipeline.mesh.rank("pp"))
    with pytest.raises(ValueError, match=r"one shape, got .*\[1, 18\].* micro-batch 0 and .*16"):
        pipeline.step(pipeline.inputs(torch.zeros(len(ROWS), 34, dtype=torch.int64)))
    with pytest.raises(ValueError, match=r"4 micro-batches in a step, got 3 in kwarg_mbs: build"):
        pipeline.step(inputs | {"kwarg_mbs": inputs["kwarg_mbs"][:3]})
    with torch.no_grad(), pytest.raises(ValueError, match="got one under no_grad"):
        pipeline.step(inputs)
    schedule = pipeline.schedule
    schedule.scale_grads = True
    with pytest.raises(ValueError, match="scale_grads=True, which divides them"):
        pipeline.step(inputs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "degrees", "compile", "stages_of_rank"),
    [
        (ScheduleGPipe, PP_AND_CP, None, 1),
        (Schedule1F1B, PP_AND_CP, GRAPHS, 1),
        (ScheduleInterleaved1F1B, PP_AND_CP, None, 2),
        (ScheduleInterleaved1F1B, Degrees(pp=2, dp_replicate=2), GRAPHS, 2),
        (Schedule1F1B, Degrees(pp=2, tp=2), None, 1),
    ],
)
@spmd(ranks=4)
def test_schedules_equal_one_device(mesh, kind, degrees, compile, stages_of_rank):
    pipeline = Pipeline(kind, degrees, compile, stages_of_rank=stages_of_rank)
    with count_graphs() as counted:
        for _ in range(2):
            pipeline.reference.zero_grad()
            pipeline.parts.zero_grad()
            pipeline.assert_equals_one_device()
    assert (counted.graphs, counted.breaks) == (bool(compile), 0)


@spmd(ranks=4)
def test_backward_passes_cut_in_two_equal_one_device(mesh):
    pipeline = Pipeline(ScheduleInterleavedZeroBubble, PP_AND_CP, stages_of_rank=2)
    # What FSDP frees after forward would have no gradient, without a word of torch's. Ranks of the
    # other stages would wait for those that refuse.
    freed = pipeline.mesh.rank("pp") == 1
    pipeline.parts[0].set_reshard_after_forward(freed)
    inputs = pipeline.inputs(torch.zeros(len(ROWS), SEQ_LEN, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"misses weights that FSDP frees .*_forward\(False\)"):
        pipeline.step(inputs)
    pipeline.parts[0].set_reshard_after_forward(False)
    pipeline.assert_equals_one_device()
    for part in pipeline.parts:
        part.set_reshard_after_forward(True)
    with pytest.raises(ValueError, match=r"misses weights that FSDP frees"):
        pipeline.step(inputs)


@spmd(ranks=4)
def test_weights_that_a_cut_backward_pass_would_leave_out_are_refused_by_all(mesh):
    """Behind a frozen stage no input needs a gradient, from which torch looks for weights."""
    pipeline = Pipeline(ScheduleInterleavedZeroBubble, PP_AND_CP, stages_of_rank=2)
    for part in pipeline.parts:
        part.requires_grad_(part.embedding is None)
    inputs = pipeline.inputs(torch.zeros(len(ROWS), SEQ_LEN, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"got none for \d+ of stage 1, 'layers\.1\..*use a sched"):
        pipeline.step(inputs)


def test_schedule_of_another_kind_is_refused():
    nothing = {"arg_mbs": [], "kwarg_mbs": [], "target_mbs": []}
    with pytest.raises(TypeError, match="use one of these, whose gradients are known to be right"):
        step_microbatches(object(), **nothing)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "degrees", "checkpoint"),
    [
        (ScheduleZBVZeroBubble, PP_AND_CP, KEEP_ALL),
        (ScheduleDualPipeV, PP_AND_CP, KEEP_ALL),
        (ScheduleInterleavedZeroBubble, PP_AND_CP, FullCheckpoint()),
        (ScheduleInterleavedZeroBubble, Degrees(pp=2, dp_replicate=2), KEEP_ALL),
        (ScheduleInterleavedZeroBubble, Degrees(pp=2, tp=2), KEEP_ALL),
    ],
)
@spmd(ranks=4)
def test_schedules_that_cut_backward_passes_equal_one_device(mesh, kind, degrees, checkpoint):
    pipeline = Pipeline(kind, degrees, stages_of_rank=2, checkpoint=checkpoint)
    for _ in range(2):
        pipeline.reference.zero_grad()
        pipeline.parts.zero_grad()
        pipeline.assert_equals_one_device()


class Routed(nn.Module):
    """A layer whose router has losses of its own; also called with what no stage sends."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({name: nn.Linear(8, 8, dtype=torch.float64)})
        self.loss = RouterLoss(balance=0.3, z=0.2)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        (layer,) = self.layers.values()
        x = layer(x)
        logits = x.flatten(0, 1)
        probabilities = logits.softmax(-1)
        weight, index = probabilities.topk(2)
        chosen = {"logits": logits, "probabilities": probabilities, "index": index}
        weight = self.loss(weight, **chosen, real=None)
        return x * weight.sum(-1).view(*x.shape[:2], 1)


def routed(names):
    torch.manual_seed(0)
    return [Routed(name) for name in names]


def expected_of_routers(layers, inputs, targets):
    model = nn.Sequential(*layers)
    for layer in layers:
        layer.loss.parts = len(inputs)
    for x, target in zip(inputs, targets, strict=True):
        token_mean_loss(model(x), target, torch.tensor(4 * len(inputs))).backward()


def step_of(part, mesh, inputs, targets):
    index, count = mesh.rank("pp"), len(inputs)
    stage = PipelineStage(part, index, 2, torch.device("cpu"), group=mesh.pp.get_group())
    options = {"loss_fn": token_mean_loss, "scale_grads": False}
    schedule = ScheduleGPipe(stage, n_microbatches=count, **options)
    given = {"arg_mbs": [(x,) for x in inputs], "target_mbs": targets}
    given["kwarg_mbs"] = [{"lengths": torch.arange(1 + i)} for i in range(count)]
    tokens = {"global_tokens": torch.tensor(4 * count)}
    uneven = given | {"arg_mbs": [(torch.ones(1, 5 + i, 8),) for i in range(count)]}
    with pytest.raises(ValueError, match=r"one shape, got .* in micro-batch 1"):
        step_microbatches(schedule, **uneven, loss_kwargs=tokens)
    # Neither what was refused nor what no stage sends says what shape micro-batches have.
    step_microbatches(schedule, **given, loss_kwargs=tokens)


@spmd(ranks=2)
def test_each_schedule_divides_losses_of_routers_by_its_own_micro_batches(mesh):
    on = ParallelMesh.from_degrees(Degrees(pp=2), "cpu")
    part = routed("01")[on.rank("pp")]
    for count in (2, 4):
        layers = routed("01")
        inputs = list(torch.randn(count, 1, 4, 8, dtype=torch.float64))
        targets = list(torch.randint(8, (count, 1, 4)))
        expected_of_routers(layers, inputs, targets)
        part.zero_grad()
        step_of(part, on, inputs, targets)
        assert_close(gradients(part), gradients(layers[on.rank("pp")]))
        assert part.loss.parts == 1


@spmd(ranks=2)
def test_parameters_of_one_name_in_two_stages_are_warned_of(mesh):
    """A checkpoint would load those of one stage into both."""
    on = ParallelMesh.from_degrees(Degrees(pp=2), "cpu")
    inputs, targets = [torch.randn(1, 4, 8, dtype=torch.float64)] * 2, [torch.ones(1, 4).long()] * 2
    with pytest.warns(UserWarning, match=r"'layers\.0\.weight' in stages 0 and 1: if you save"):
        step_of(routed("00")[on.rank("pp")], on, inputs, targets)
