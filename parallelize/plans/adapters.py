"""Adapters of peft (LoRA) beside what they adapt, split over tp in the same way.

LoRA adds B(A(x)) to a linear layer. Where the layer's outputs are split, so are those of B, and A
is whole; where its inputs are split, so are those of A, whose sum over the ranks B reads whole.
"""

import re
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel

from dtcp.parallelize.tensor_parallel import (
    WHOLE_FOR_HEADS,
    Conv1DRows,
    Conv1DSum,
    LocalParams,
    ReplicatedLinear,
    ReplicatedParams,
    SegmentRows,
    SumForHeads,
)

BASE, A, B = "base_layer", "lora_A", "lora_B"
_PART = re.compile(
    rf"(.*)\.({BASE}|{A}|{B}|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|lora_\w+)"
    r"(\.[^.]+)?$"
)


def adapted(name: str) -> tuple[str, str]:
    """The layer of peft that a module is part of, and which part it is; itself and "" otherwise."""
    match = _PART.match(name)
    return (match.group(1), match.group(2)) if match else (name, "")


def adapted_layers(module: nn.Module, is_layer: Callable[[nn.Module], bool]) -> dict[str, Any]:
    """The layers of a kind in a module, adapted or not, by their names there."""
    layers: dict[str, Any] = {}
    for name, each in module.named_modules():
        is_part = any(name.startswith(f"{other}.") for other in layers)
        layer = getattr(each, BASE, each)
        if is_layer(layer) and not is_part:
            layers[name] = layer
    return layers


def adapter_style(base: ParallelStyle | None, target: str, part: str) -> ParallelStyle | None:
    """The style of a part of an adapted layer.

    Args:
        base: that of the layer that is adapted; None: it is whole.
    Raises:
        ValueError: an adapter of another form than B(A(x)), on what tp splits.
    """
    if part == BASE or base is None:
        return base
    if isinstance(base, LocalParams) and _is_whole(base):
        return base
    if isinstance(base, LocalParams) and part in (A, B):
        # Of rows: B has as many. Of a sum for heads: A has the inputs, and B goes on with the sum.
        split = A if isinstance(base, SumForHeads) else B
        return base if part == split else WHOLE_FOR_HEADS
    if isinstance(base, Conv1DRows) and part in (A, B):
        return WHOLE_FOR_HEADS if part == A else SegmentRows(segments=base.segments)
    if isinstance(base, ColwiseParallel | RowwiseParallel | Conv1DSum) and part in (A, B):
        if isinstance(base, ColwiseParallel):
            return ReplicatedLinear() if part == A else base
        return RowwiseParallel() if part == A else ReplicatedParams()
    raise ValueError(
        f"Tensor parallelism splits LoRA on linear layers that it splits, got {part} on {target}, "
        f"which is {type(base).__name__}: leave it out of target_modules (and use_dora off), or "
        f"set tp=1 and give the ranks to cp."
    )


def _is_whole(base: LocalParams) -> bool:
    return base.placement.is_replicate() and not isinstance(base, SegmentRows)


def check_is_called(target: str, layer: Any, style: ParallelStyle | None) -> None:
    """Refuse an adapter that is added to a weight which a style gives its layer when it is called.

    Raises:
        ValueError: as above, naming the layer.
    """
    if hasattr(layer, "parameter_name") and isinstance(style, LocalParams):
        raise ValueError(
            f"Tensor parallelism gives a layer its weight where it is called, got LoRA that is "
            f"added to {layer.parameter_name} of {target} before: leave it out of target_modules "
            f"and target_parameters, or set tp=1 and give the ranks to cp."
        )


def adapted_model(model: Any) -> Any:
    """The model of transformers inside of a PeftModel; the model itself if it is none.

    Raises:
        ValueError: adapters that are tokens before the row, which would stand before every shard;
            that begin at a token of the row (aLoRA), which one shard has; or that add a loss, or
            routes, around the model.
    """
    if not hasattr(model, "peft_config") or not hasattr(model, "get_base_model"):
        return model
    prompts = [name for name, each in model.peft_config.items() if each.is_prompt_learning]
    if prompts:
        raise ValueError(
            f"Adapters are beside the layers of a model, got {prompts}, which learn tokens before "
            f"the row (prompt or prefix tuning): use LoRA."
        )
    invoked = {
        name: tokens
        for name, each in model.peft_config.items()
        if (tokens := getattr(each, "alora_invocation_tokens", None))
    }
    if invoked:
        raise ValueError(
            f"Adapters act on every token of a row, got alora_invocation_tokens={invoked}, which "
            f"peft looks for in the ids of a shard: use LoRA without them."
        )
    from peft.tuners.tuners_utils import BaseTuner

    tuner = type(model.base_model)
    if tuner.forward is not BaseTuner.forward:
        raise ValueError(
            f"Adapters are beside the layers of a model, got {list(model.peft_config)} of "
            f"{tuner.__name__}, which does something of its own around the model, as AdaLoRA adds "
            f"a loss: use LoRA."
        )
    return model.get_base_model()
