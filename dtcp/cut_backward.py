"""What a backward pass that is cut in two must find in a stage: zero-bubble schedules of torch's.

    whole    stage_backward         gradients of inputs and weights at once
    cut      stage_backward_input   of inputs; keeps those that arrive where weights join
             stage_backward_weight  of weights, from there on, when there is time

Weights are what the stage's parameters are when the first part starts
(`backward_maybe_with_nosync` in torch/distributed/pipelining/stage.py, 2.13-2.15). FSDP that
reshards after forward has put shards in their place by then, which are no part of the graph, and
gathers too late, in a hook of the pass itself: they would have no gradient, and nobody says so.
Nor has what the loss reaches without a way through the stage's input, or through one that needs no
gradient, since the stages before are frozen.
"""

from collections.abc import Iterable

from torch import nn
from torch.distributed.fsdp import FSDPModule

from dtcp._torch.compiler import is_compiled_module
from dtcp._torch.ddp import has_arrival_hooks, reduces_as_gradients_arrive
from dtcp._torch.fsdp import trained_groups_resharded_after_forward
from dtcp.parallelize.activation_checkpoint import has_selective_blocks
from dtcp.parallelize.compile import has_compiled_blocks

WHOLE = "a schedule that runs each backward pass in one piece, 1F1B say"


def check_backward_can_be_cut(stage: nn.Module) -> None:
    """Refuse a stage whose gradients would be missing, or whose graph cannot be run twice.

    Raises:
        ValueError: names the module; the same on all ranks of a stage.
    """
    if has_compiled_blocks(stage) or any(map(is_compiled_module, stage.modules())):
        raise ValueError(
            f"A backward pass cut in two runs parts of a graph twice, got blocks that are "
            f"compiled, whose graphs are one piece: leave compile out, or use {WHOLE}."
        )
    if has_selective_blocks(stage):
        raise ValueError(
            f"A backward pass cut in two recomputes twice, got blocks whose checkpoint keeps some "
            f"of what is in them, which torch recomputes once: use NoCheckpoint, FullCheckpoint "
            f"where no experts are on other ranks, or {WHOLE}."
        )
    for name, module in stage.named_modules():
        found = name or type(stage).__name__
        if reduces_as_gradients_arrive(module):
            raise ValueError(
                f"A backward pass cut in two calls no hooks that reduce gradients as they arrive, "
                f"got {found!r} of {type(module).__name__}: use dtcp.parallelize.parallelize, or "
                f"fully_shard."
            )
        if isinstance(module, FSDPModule):
            _check_gathered(stage, found, module)
    # FSDP calls those of its weights itself.
    hooked = [name for name, weight in stage.named_parameters() if has_arrival_hooks(weight)]
    if hooked and not isinstance(stage, FSDPModule):
        raise ValueError(
            f"A backward pass cut in two calls no hooks of gradients that have been accumulated, "
            f"got one of {hooked[0]!r}: call fully_shard of the stage, step the optimizer after "
            f"the step, or use {WHOLE}."
        )


def check_gradients_arrived(stages: Iterable[tuple[int, nn.Module]]) -> None:
    """Refuse what a cut backward pass has left without gradients: after a step, before any learns.

    Args:
        stages: with their numbers.
    Raises:
        ValueError: names the stage and a weight.
    """
    for number, stage in stages:
        weights = stage.named_parameters()
        missed = [name for name, x in weights if x.requires_grad and x.grad is None]
        if missed:
            raise ValueError(
                f"A backward pass cut in two finds weights between a stage's input and its output, "
                f"got none for {len(missed)} of stage {number}, {missed[0]!r} for one: freeze what "
                f"takes no part in the loss, and where stages before it are frozen, or its input "
                f"is cut off, use {WHOLE}."
            )


def _check_gathered(stage: nn.Module, name: str, module: FSDPModule) -> None:
    if not isinstance(stage, FSDPModule):
        raise ValueError(
            f"A backward pass cut in two finds weights of FSDP where the whole stage is a module "
            f"of it, got {name!r} in a {type(stage).__name__}, which is none: call fully_shard of "
            f"the stage, too."
        )
    if trained_groups_resharded_after_forward(stage, module):
        raise ValueError(
            f"A backward pass cut in two misses weights that FSDP frees after forward, got {name!r}"
            f" with reshard_after_forward=True: pass fsdp=FSDP(reshard_after_forward=False) to "
            f"parallelize, or call set_reshard_after_forward(False) of the stage."
        )
