"""Whether fla-core's kernels run here, and take these keys and values."""

import importlib.util
import logging
from functools import cache

import torch
from torch import Tensor

LOG = logging.getLogger("dtcp.kernels")
WIDEST_KEY = 256
"""Key dim up to which fla has kernels."""


def refusal_of_fla(k: Tensor, v: Tensor) -> str | None:
    """What of tensors on a GPU fla's kernels do not do; None if they do all."""
    widths = k.shape[-1], v.shape[-1]
    if v.dtype == torch.float64:
        return "do not compute in fp64"
    if widths[0] > WIDEST_KEY:
        return f"take keys of at most {WIDEST_KEY}"
    if v.element_size() == 2 and any(width % 2 for width in widths):
        return f"take keys and values of an even number of channels in half precision, not {widths}"
    if torch.cuda.get_device_capability(v.device) < (8, 0):
        return "run on GPUs from Ampere on"
    return None if has_fla() else "are not installed: pip install fla-core"


@cache
def has_fla() -> bool:
    """Whether fla is installed."""
    return importlib.util.find_spec("fla") is not None


@cache
def say_plain_torch(rule: str, key_dim: int, dtype: torch.dtype, reason: str) -> None:
    """Warn once of each that a GPU runs without fla's kernels, and why."""
    LOG.warning(
        "%s (keys of %d, %s) is computed by plain torch, slower on a GPU: fla-core's kernels %s",
        rule,
        key_dim,
        str(dtype).removeprefix("torch."),
        reason,
    )
