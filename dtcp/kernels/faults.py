"""What is wrong with a kernel on the device it will run on: how every self-test is run."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

BOUND = 3e-2
"""Of the largest value; weights and results are rounded to half precision, by 4e-3 of theirs."""

FAILED = "failed its self-test"
"""What every fault begins with."""


def fault_in(check: Callable[[], str | None], device: torch.device) -> str | None:
    """What a check of a kernel says of it, in a few words; None if its results are right.

    Args:
        check: None, or what is wrong. It may wait for the device, which a step must not.
    """
    on_gpu = device.type == "cuda"
    mode = torch.cuda.get_sync_debug_mode() if on_gpu else 0
    try:
        if on_gpu:
            torch.cuda.set_sync_debug_mode(0)
        # Its tables are the host's, also under torch.set_default_device("cuda").
        with torch.device("cpu"):
            wrong = check()
    # Whether the kernel runs here is the question, so its error is the answer: it becomes the
    # fault, for which the kernel is passed over, by name in the log. Compilers of kernels raise
    # classes of their own: Triton's and CuTe's derive from Exception alone, so nothing narrower
    # would catch them. No BaseException: Ctrl-C ends it.
    except Exception as error:  # noqa: BLE001
        text = str(error).strip().splitlines() or [""]
        wrong = f"{type(error).__name__}: {text[0][:200]}"
    finally:
        if on_gpu:
            torch.cuda.set_sync_debug_mode(mode)
    return None if wrong is None else f"{FAILED} ({wrong})"


def largest_error(ours: Tensor, right: Tensor) -> float:
    """Over the largest value of what is right."""
    return float((ours - right).abs().max() / right.abs().max().clamp(min=1e-9))


def token_error(ours: Tensor, right: Tensor) -> float:
    """The largest of any token, [..., D], over what is right of it and 5 % of the largest value.

    Few queries see the last keys, whose gradients are small: beside others what is wrong with them
    would not show. In kernels' arithmetic, on a CPU, it is 9e-3 at most.
    """
    wrong, size = (x.abs().amax(-1) for x in (ours - right, right))
    return float((wrong / (size + 0.05 * size.max()).clamp(min=1e-9)).max())


def lse_error(ours: Tensor, right: Tensor) -> float:
    """In itself, whatever its size: weights are wrong by that factor. Of -inf, inf if not both."""
    blind = right == -torch.inf
    if not torch.equal(ours == -torch.inf, blind):
        return float("inf")
    return float((ours - right).masked_fill(blind, 0.0).abs().max())


def excess(what: str, errors: Mapping[str, float]) -> str | None:
    """What to say where the error of a result is over the bound, as NaN is; None if none is."""
    wrong = {name: error for name, error in errors.items() if not error <= BOUND}
    if not wrong:
        return None
    # NaN is the worst, and the largest of all that it is compared with.
    name = max(wrong, key=lambda name: (wrong[name] != wrong[name], wrong[name]))
    return f"{what}: an error of {wrong[name]:.1e} in {name}"
