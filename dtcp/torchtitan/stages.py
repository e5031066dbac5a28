"""Pipeline stages of dtcp's models, as torchtitan's Trainer asks for them.

Layers are cut as torchtitan cuts its own models, by the same settings, and run by schedules of
torch's. A stage keeps its layers under their numbers in the whole model, so that a checkpoint is
the same with stages and without.
"""

import copy
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dtcp.torchtitan.section import Section
from dtcp.torchtitan.stage_forwards import StageForward
from dtcp.torchtitan.stage_part import Copied, Sharded, StagePart

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
)
from torch.distributed.tensor import Replicate, Shard
from torchtitan.config import TORCH_DTYPE_MAP, ParallelismConfig, TrainingConfig
from torchtitan.distributed import ParallelDims

from dtcp.mixer_metadata import MixerKinds
from dtcp.parallelize.tied_parameters import find_tied_parameters
from dtcp.sequence.layout import SequenceLayout
from dtcp.softmax.model_masks import masks_of

ONE_STAGE: Mapping[str, Any] = {"1F1B": Schedule1F1B, "GPipe": ScheduleGPipe}
"""Schedules of ranks that have a stage each, by torchtitan's names."""
SEVERAL: Mapping[str, Any] = {"Interleaved1F1B": ScheduleInterleaved1F1B}
"""Those of ranks that have several."""
SCHEDULES: Mapping[str, Any] = {**ONE_STAGE, **SEVERAL}


def layers_of_stages(parallelism: ParallelismConfig, layers: int) -> list[range]:
    """Which layers each stage has: as many as torchtitan gives them.

    Raises:
        ValueError: naming the setting by which a stage would have nothing, or ranks no stage.
    """
    ranks, degree = parallelism.pipeline_parallel_degree, "--parallelism.pipeline_parallel_degree"
    first = parallelism.pipeline_parallel_first_stage_less_layers
    last = parallelism.pipeline_parallel_last_stage_less_layers
    total = layers + first + last
    stages = _number_of_stages(parallelism, total)
    each, more = divmod(total, stages)
    sizes = [each + (index < more) for index in range(stages)]
    sizes[0] -= first
    sizes[-1] -= last
    # Of the ends, one may have the embedding or the head alone.
    if each < 1 or min(sizes) < 0:
        raise ValueError(
            f"Every stage has layers, an embedding or a head, got {degree} {ranks} with {stages} "
            f"stages for {layers} layers, of which --parallelism.pipeline_parallel_first_stage_"
            f"less_layers {first} and --parallelism.pipeline_parallel_last_stage_less_layers "
            f"{last} leave {sizes}: take fewer stages, or lower these."
        )
    ends = [sum(sizes[: index + 1]) for index in range(stages)]
    return [range(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def _number_of_stages(parallelism: ParallelismConfig, total: int) -> int:
    ranks, schedule = (
        parallelism.pipeline_parallel_degree,
        parallelism.pipeline_parallel_schedule,
    )
    of_stage = parallelism.pipeline_parallel_layers_per_stage
    if of_stage is None:
        return ranks if schedule in ONE_STAGE else 2 * ranks
    stages = math.ceil(total / of_stage)
    fits = stages == ranks if schedule in ONE_STAGE else stages >= 2 * ranks
    if stages % ranks or not fits:
        wanted = "one stage" if schedule in ONE_STAGE else "as many stages, two or more"
        raise ValueError(
            f"Ranks of pp have {wanted} each under {schedule}, got "
            f"--parallelism.pipeline_parallel_layers_per_stage {of_stage}, which makes {stages} "
            f"for --parallelism.pipeline_parallel_degree {ranks} (ends count as layers, by "
            f"first_stage_less_layers and last_stage_less_layers): give another, or leave it out."
        )
    return stages


def micro_batches(training: TrainingConfig, parallelism: ParallelismConfig) -> int:
    """Of a step of the schedule, 1 without stages."""
    if parallelism.pipeline_parallel_degree == 1:
        return 1
    return training.local_batch_size // parallelism.pipeline_parallel_microbatch_size


def rows_of_micro_batch(training: TrainingConfig, parallelism: ParallelismConfig) -> int:
    """Rows that a rank runs forward at a time."""
    if parallelism.pipeline_parallel_degree == 1:
        return training.local_batch_size
    return parallelism.pipeline_parallel_microbatch_size


def pipeline_stages(
    model: nn.Module,
    *,
    parallel_dims: ParallelDims,
    training: TrainingConfig,
    parallelism: ParallelismConfig,
    device: torch.device,
    model_config: Any,
    parallelize_fn: Callable[..., nn.Module],
    loss_fn: Callable[..., Any],
    section: Section,
    how: StageForward,
    cut: Callable[..., Any] | None = None,
    **sections: Any,
) -> tuple[Any, list[nn.Module], bool, bool]:
    """torchtitan's pipelining_fn for a model on the meta device.

    Args:
        section: bound by our Trainer, as that of parallelize_fn is.
        how: bound where the model's spec is made.
        cut: makes a stage of the model, its part, how and whether it is the last one; None for one
            whose modules are fields of the model.
    Returns:
        the schedule, this rank's stages, and whether the first and the last one are among them.
    Raises:
        ValueError: a weight of no stage.
    """
    _check_parts(model, how)
    cut = cut or _cut
    group = parallel_dims.get_mesh("pp").get_group()
    number = sum(1 for _ in model.get_submodule(how.layers).children())
    layers = layers_of_stages(parallelism, number)
    sharded = _sharded(how, parallel_dims, parallelism)
    known = _known_to_all(model, how, layers, sharded, group=group, device=device)
    sent = (section.sequence_layout(), how.stream(model_config), sharded)
    scored = 1 + getattr(model, "mtp_depths", 0)
    sizes = {"vocab_size": model_config.vocab_size, "scored": scored}
    shapes = _Shapes.of(training, parallelism, *sent, **sizes)
    sections |= {"parallel_dims": parallel_dims, "training": training, "parallelism": parallelism}
    parts, stages, last = [], [], len(layers) - 1
    for index in range(dist.get_rank(group), len(layers), dist.get_world_size(group)):
        own = replace(known, index=index, layers=layers[index], whole=copy.deepcopy(known.whole))
        part = parallelize_fn(cut(model, own, how, last=index == last), **sections)
        for name in own.copies:
            # No optimizer steps it. Whoever has built them lets it have gradients.
            part.get_parameter(name).requires_grad_(False)
        if index < last:
            part.register_forward_hook(functools.partial(_check_stream, shapes.stream))
        ends = shapes.of_stage(index, len(layers))
        parts.append(part)
        stages.append(PipelineStage(part, index, len(layers), device, *ends, group=group))
    schedule = SCHEDULES[parallelism.pipeline_parallel_schedule](
        stages if parallelism.pipeline_parallel_schedule in SEVERAL else stages[0],
        n_microbatches=micro_batches(training, parallelism),
        loss_fn=functools.partial(_loss_alone, loss_fn),
        scale_grads=False,
    )
    return schedule, parts, stages[0].is_first, stages[-1].is_last


def _sharded(
    how: StageForward, dims: ParallelDims, parallelism: ParallelismConfig
) -> Sharded | None:
    """How what stages hand on lies on tp."""
    if not (how.over_tp and dims.tp_enabled):
        return None
    placement = Shard(1) if parallelism.enable_sequence_parallel else Replicate()
    return Sharded(dims.get_mesh("tp"), (placement,))


def _known_to_all(
    model: nn.Module,
    how: StageForward,
    layers: Sequence[range],
    sharded: Sharded | None,
    *,
    group: dist.ProcessGroup,
    device: torch.device,
) -> StagePart:
    """What all stages know alike, as the first one has it."""
    whole = copy.deepcopy(model)
    how.prepare(whole)
    return StagePart(
        index=0,
        layers=layers[0],
        masks=masks_of(MixerKinds.of(whole)),
        whole=whole,
        reads_ids=how.reads_ids,
        sharded=sharded,
        random=_common_random_state(group) if device.type == "cpu" else None,
        tied=find_tied_parameters(model),
        copied=_copied(model, how, last=len(layers) - 1),
    )


def _check_parts(model: nn.Module, how: StageForward) -> None:
    """Refuse weights that would be left out, as `train.py` does by settings."""
    placed = (how.layers, *how.first, *how.last_of(model))
    named = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    left = [name for name in named if not _is_in(name, placed)]
    # Of layers that share a weight, more stages than the ends might.
    tied = find_tied_parameters(model)
    left += [x for names in tied for x in names if _is_in(x, (how.layers,))]
    if left:
        raise ValueError(
            f"Every weight is in one stage, or in both ends, got {left[0]} of "
            f"{type(model).__name__}, which is not: set the degree of pp to 1."
        )


def _is_in(name: str, modules: Iterable[str]) -> bool:
    """Whether a parameter is one of these modules'."""
    return name.startswith(tuple(f"{module}." for module in modules))


def _copied(model: nn.Module, how: StageForward, *, last: int) -> Copied:
    """Of each weight outside of layers that both ends hold, its name in either."""
    names: dict[Tensor, dict[int, str]] = {}
    for index, modules in ((0, how.first), (last, how.last_of(model))):
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if _is_in(name, modules):
                names.setdefault(parameter, {}).setdefault(index, name)
    return tuple(of_stages for of_stages in names.values() if len(of_stages) > 1)


def _check_stream(expected: Tensor, stage: nn.Module, args: Any, output: Tensor) -> None:
    """Refuse what the next stage has no buffer for: it would read other numbers out of the bytes.

    Raises:
        TypeError: as above.
    """
    if type(output) is Tensor and (output.shape, output.dtype) == (expected.shape, expected.dtype):
        return
    raise TypeError(
        f"A stage hands on the residual stream, a plain tensor of {tuple(expected.shape)} in "
        f"{expected.dtype}, got {type(output).__name__} of {tuple(output.shape)} in "
        f"{output.dtype} from {type(stage).__name__}: set the degree of pp to 1."
    )


def _loss_alone(loss_fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
    """torchtitan's losses come with metrics, which schedules do not take."""
    loss: Tensor = loss_fn(*args, **kwargs)[0]
    return loss


def _cut(model: nn.Module, part: StagePart, how: StageForward, *, last: bool) -> Any:
    """A copy of the model with a stage's modules alone, which keep their names."""
    stage: Any = copy.deepcopy(model)
    kept = {"layers", *(how.first if part.index == 0 else ())}
    kept |= set(how.last_of(model) if last else ())
    for name, _ in list(stage.named_children()):
        if name not in kept:
            setattr(stage, name, None)
    for number, _ in list(stage.layers.named_children()):
        if int(number) not in part.layers:
            delattr(stage.layers, number)
    stage.stage = part
    stage.init_weights = functools.partial(part.init_weights, stage)
    stage.forward = functools.partial(how.forward, stage)
    return stage


def _common_random_state(group: dist.ProcessGroup) -> Tensor:
    """That of the first stage, on all: torchtitan seeds each apart, for each draws by itself."""
    state = [torch.get_rng_state()]
    dist.broadcast_object_list(state, group=group, group_src=0)
    return state[0]


@dataclass(frozen=True)
class _Shapes:
    """What stages are called with and return, on the meta device.

    Given to torch, which would run a micro-batch once more to find them.
    """

    ids: Tensor
    stream: Tensor
    logits: Tensor
    scored: int
    """Tokens that are scored at each place, in training."""

    @classmethod
    def of(
        cls,
        training: TrainingConfig,
        parallelism: ParallelismConfig,
        layout: type[SequenceLayout],
        stream: tuple[int, ...],
        sharded: Sharded | None,
        *,
        vocab_size: int,
        scored: int,
    ) -> "_Shapes":
        cp = parallelism.context_parallel_degree
        multiple = layout.multiple(cp)
        tokens = -(-training.seq_len // multiple) * multiple // cp
        shape = (parallelism.pipeline_parallel_microbatch_size, tokens)
        dtype = TORCH_DTYPE_MAP[training.mixed_precision_param]
        parts = 1 if sharded is None or not sharded.placements[0].is_shard() else sharded.ranks
        numbers: dict[str, Any] = {"dtype": dtype, "device": "meta", "requires_grad": True}
        return cls(
            torch.empty(shape, dtype=torch.int64, device="meta"),
            torch.empty(shape[0], tokens // parts, *stream, **numbers),
            torch.empty(*shape, vocab_size, **numbers),
            scored,
        )

    def of_stage(self, index: int, stages: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        """What one of so many stages is called with and returns."""
        called = self.ids if index == 0 else self.stream
        return called, (self.logits,) * self.scored if index == stages - 1 else (self.stream,)
