"""Run fla's kernels in Triton's interpreter against the reference, for test_fla.py.

Triton reads TRITON_INTERPRET when it is imported, so this script runs in a process of its own. The
interpreter has no timer for an autotuner and takes no tensor as a loop bound: this script replaces
both. Prints the largest error of each result, divided by its largest value.
"""

import importlib
import json
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.autotuner import Autotuner
from triton.runtime.interpreter import TensorHandle

from dtcp.kernels.delta_rule import fla
from dtcp.kernels.delta_rule.fla import FlaDeltaRule
from dtcp.kernels.delta_rule.fla_channel import FlaChannelDeltaRule
from dtcp.kernels.delta_rule.reference import ReferenceDeltaRule
from dtcp.kernels.delta_rule.self_test import results_of
from dtcp.kernels.delta_rule.types import DeltaInputs
from dtcp.kernels.linear_attention.fla import FlaLinearAttention
from dtcp.kernels.linear_attention.reference import ReferenceLinearAttention
from dtcp.kernels.linear_attention.types import LinearInputs
from tests.harness.interpreter import patch_language_once_a_launch

KERNELS = (
    "fla.ops.common.chunk_delta_h",
    "fla.ops.common.chunk_h",
    "fla.ops.common.chunk_o",
    "fla.ops.gated_delta_rule.chunk_fwd",
    "fla.ops.gated_delta_rule.wy_fast",
    "fla.ops.utils.cumsum",
    "fla.ops.kda.chunk_bwd",
    "fla.ops.kda.chunk_intra",
    "fla.ops.kda.chunk_intra_token_parallel",
    "fla.ops.kda.wy_fast",
    "fla.ops.gla.chunk",
    "fla.ops.cp.chunk_fwd",
    "fla.ops.cp.chunk_bwd",
)
HEADS = 2


def first_config(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Launch without measuring; with both heads in a block, where blocks take several."""
    self.nargs = dict(zip(self.arg_names, args, strict=False))
    configs = self.prune_configs(kwargs)
    config = next((each for each in configs if each.kwargs.get("BH") == HEADS), configs[0])
    return self.fn.run(*args, **{**kwargs, **config.all_kwargs()})


def counters(*bounds: Any) -> Iterator[Any]:
    """`range` that takes tensors as bounds."""
    numbers = [int(b.handle.data.reshape(-1)[0]) if hasattr(b, "handle") else b for b in bounds]
    for i in range(*numbers):
        yield tl.tensor(TensorHandle(np.array([i], dtype=np.int32), tl.int32), tl.int32)


def prepare_fla() -> Any:
    """Make fla's kernels run in the interpreter; return the module whose guards the caller sets."""
    patch_language_once_a_launch()
    Autotuner.run = first_config
    importlib.import_module("fla.ops.utils.cache").CachedAutotuner.run = first_config
    modules = [importlib.import_module(name) for name in KERNELS]
    for module in modules:
        module.range = counters
        module._check_cp_device = lambda device: None
    return importlib.import_module("fla.ops.common.chunk_o")


def inputs() -> tuple[DeltaInputs, Tensor, Tensor]:
    """Two rows that end inside a chunk, documents in the first; a state, and a gradient.

    A state goes through the second one, slowly.
    """
    rows, length, groups, heads, width = 2, 80, 1, HEADS, 16
    torch.manual_seed(0)
    unit = torch.nn.functional.normalize
    q, k = (unit(torch.randn(rows, length, groups, width), dim=-1) for _ in range(2))
    v, grad = (torch.randn(rows, length, heads, width) for _ in range(2))
    g, beta = -torch.rand(rows, length, heads) / 40, torch.rand(rows, length, heads)
    starts = torch.zeros(rows, length, dtype=torch.int32)
    starts[0, [0, 3, 4, 70]] = 1
    return DeltaInputs(q, k, v, g, beta, starts), torch.randn(rows, heads, width, width), grad


def by_channel() -> dict[str, float]:
    """Errors of the kernels for decays by channel.

    The first row is the middle of a document, through which a state goes slowly; the second one has
    documents of one token, whose starts round what is added to them: it fades as fast.
    """
    x, state, grad = inputs()
    decay = -torch.rand(*x.v.shape[:3], x.k.shape[-1])
    decay[0] /= 40
    x = x._replace(g=decay, starts=_many_starts(x))
    return errors_of(FlaChannelDeltaRule(), ReferenceDeltaRule(), x, state, grad)


def linear() -> tuple[LinearInputs, Tensor, Tensor]:
    """For gated linear attention; one of the heads forgets at once, the other slowly."""
    x, state, grad = inputs()
    decay = x.g * torch.tensor([0.8, 800.0])
    return LinearInputs(x.q, x.k, x.v, decay, _many_starts(x)), state, grad


def _many_starts(x: DeltaInputs) -> Tensor:
    starts = x.starts.clone()
    starts[0], starts[1, :60] = 0, 1
    return starts


def errors_of(kernel: Any, reference: Any, x: Any, state: Tensor, grad: Tensor) -> dict[str, float]:
    """Of output, gradients, and what ranks exchange on both ways; truth is in fp64."""
    exact = type(x)(*(part.double() if part.is_floating_point() else part for part in x))
    ours = results_of(kernel, x, grad, state)
    truth = results_of(reference, exact, grad.double(), state.double())
    return {name: relative_error(ours[name], right) for name, right in truth.items()}


def main() -> None:
    chunk_o = prepare_fla()
    if "channels" in sys.argv[1:]:
        print(json.dumps(by_channel()))
        return
    kernels = {
        "delta rule": (FlaDeltaRule(), ReferenceDeltaRule(), *inputs()),
        "linear": (FlaLinearAttention(), ReferenceLinearAttention(), *linear()),
    }
    errors = {}
    for hopper in (False, True):
        guard(chunk_o, hopper=hopper)
        # The summaries of a row that is too long for kernels' places, from those of its pieces.
        fla.MOST_PLACES = HEADS * 16 * fla.CHUNK if hopper else 2**31
        for rule, given in kernels.items():
            each = errors_of(*given)
            errors |= {f"{rule}: {name}, guarded {hopper}": error for name, error in each.items()}
    print(json.dumps(errors))


def guard(chunk_o: Any, *, hopper: bool) -> None:
    """As on a Hopper with triton 3.6, whose kernel fla refuses to run; or as on another GPU."""
    chunk_o.IS_NVIDIA_HOPPER = chunk_o.TRITON_ABOVE_3_4_0 = hopper
    chunk_o.TRITON_ABOVE_3_7_1 = not hopper


def relative_error(ours: Tensor, right: Tensor) -> float:
    # What a document's start leaves of a state is 0, and 1e-14 where it is written into the decay.
    return float((ours - right).abs().max() / right.abs().max().clamp(min=1e-6))


if __name__ == "__main__":
    main()
