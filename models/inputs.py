"""What a model is made with and called with, held against itself before the first layer."""

import torch
from torch import Tensor

from dtcp.sequence.arguments import check_tensor

IDS = (torch.int64, torch.int32)
"""What torch's embedding reads."""


def check_model_inputs(
    model: str, input_ids: Tensor, position_ids: Tensor, vocab_size: int, *, axes: int = 1
) -> None:
    """Refuse ids and positions that a layer further in would stumble over.

    Args:
        input_ids: [B, L].
        position_ids: [B, L] or [1, L]; of a RoPE of several axes [axes, B, L] too.
    Raises:
        TypeError: no tensors, or ids that are no whole numbers.
        ValueError: other shapes; ids beyond the vocabulary, where the host sees them.
    """
    check_ids(model, input_ids, vocab_size)
    check_positions(model, position_ids, input_ids.shape, axes=axes)


def check_heads(config: str, num_heads: int, num_kv_heads: int) -> None:
    """Refuse query heads that kv heads are not shared evenly among."""
    if num_heads % num_kv_heads:
        raise ValueError(
            f"{config} shares each kv head among equally many query heads, got num_heads="
            f"{num_heads}, num_kv_heads={num_kv_heads}: make num_heads a multiple of num_kv_heads."
        )


def check_ids(model: str, input_ids: Tensor, vocab_size: int) -> None:
    """Refuse what is no id of the vocabulary; ids on a device stop it in the embedding."""
    check_tensor(model, shape="[B, L]", ndim=2, dtypes=IDS, input_ids=input_ids)
    # Subclasses stand for values that are elsewhere, or not there yet.
    on_host = type(input_ids) is Tensor and input_ids.device.type == "cpu"
    if torch.compiler.is_compiling() or not on_host or not input_ids.numel():
        return
    low, high = (int(x) for x in input_ids.aminmax())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"{model} embeds the tokens of its vocabulary, got input_ids from {low} to {high} with "
            f"vocab_size={vocab_size}: use the tokenizer of this model."
        )


def check_positions(model: str, position_ids: Tensor, tokens: torch.Size, *, axes: int = 1) -> None:
    """Refuse position ids that are none of these tokens, [B, L]."""
    check_tensor(model, shape="[B, L]", position_ids=position_ids)
    shape = tuple(position_ids.shape)
    dims = (2, 3) if axes > 1 else (2,)
    fits = len(shape) in dims and shape[-1] == tokens[1] and shape[-2] in (1, tokens[0])
    if not fits or (len(shape) == 3 and shape[0] != axes):
        wanted = "[B, L] or [1, L]" + (f", or [{axes}, B, L]" if axes > 1 else "")
        raise ValueError(
            f"{model} reads a position for each token, got position_ids.shape={shape} for "
            f"{tokens[0]} rows of {tokens[1]}: give {wanted}."
        )
