"""Run fla's kernels in Triton's interpreter against the reference, for test_fla.py.

Triton reads TRITON_INTERPRET when it is imported, so this script runs in a process of its own. The
interpreter has no timer for an autotuner and takes no tensor as a loop bound: this script replaces
both. Prints the largest error of each result, divided by its largest value.
"""

import importlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.autotuner import Autotuner
from triton.runtime.interpreter import TensorHandle

from dtcp.kernels.delta_rule.fla import FlaDeltaRule
from dtcp.kernels.delta_rule.reference import ReferenceDeltaRule
from dtcp.kernels.delta_rule.types import DeltaInputs

KERNELS = (
    "fla.ops.common.chunk_delta_h",
    "fla.ops.common.chunk_o",
    "fla.ops.gated_delta_rule.chunk_fwd",
    "fla.ops.gated_delta_rule.wy_fast",
    "fla.ops.utils.cumsum",
    "fla.ops.cp.chunk_fwd",
    "fla.ops.cp.chunk_bwd",
)


def first_config(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Launch without measuring."""
    self.nargs = dict(zip(self.arg_names, args, strict=False))
    config = next(iter(self.prune_configs(kwargs)))
    return self.fn.run(*args, **{**kwargs, **config.all_kwargs()})


def counters(*bounds: Any) -> Iterator[Any]:
    """`range` that takes tensors as bounds."""
    numbers = [int(b.handle.data.reshape(-1)[0]) if hasattr(b, "handle") else b for b in bounds]
    for i in range(*numbers):
        yield tl.tensor(TensorHandle(np.array([i], dtype=np.int32), tl.int32), tl.int32)


def prepare_fla() -> Any:
    """Make fla's kernels run in the interpreter; return the module whose guards the caller sets."""
    Autotuner.run = first_config
    importlib.import_module("fla.ops.utils.cache").CachedAutotuner.run = first_config
    modules = [importlib.import_module(name) for name in KERNELS]
    for module in modules:
        module.range = counters
        module._check_cp_device = lambda device: None
    return modules[1]


def inputs() -> tuple[DeltaInputs, Tensor, Tensor]:
    """Two rows that end inside a chunk, documents in the first; a state, and a gradient."""
    rows, length, groups, heads, width = 2, 80, 1, 2, 16
    torch.manual_seed(0)
    unit = torch.nn.functional.normalize
    q, k = (unit(torch.randn(rows, length, groups, width), dim=-1) for _ in range(2))
    v, grad = (torch.randn(rows, length, heads, width) for _ in range(2))
    g, beta = -torch.rand(rows, length, heads), torch.rand(rows, length, heads)
    starts = torch.zeros(rows, length, dtype=torch.int32)
    starts[0, [0, 3, 4, 70]] = 1
    return DeltaInputs(q, k, v, g, beta, starts), torch.randn(rows, heads, width, width), grad


def main() -> None:
    chunk_o = prepare_fla()
    x, state, grad = inputs()
    exact = DeltaInputs(*(part.double() if part.is_floating_point() else part for part in x))
    seen: dict[str, Tensor] = {}

    def carry(name: str, entering: Tensor) -> Callable[[Tensor], Tensor]:
        def keep(summary: Tensor) -> Tensor:
            seen[name] = summary
            return entering

        return keep

    kernel, exactly, errors = FlaDeltaRule(), ReferenceDeltaRule(), {}
    (out,), _ = kernel.forward([x], carry("forward", state))
    (right,), _ = exactly.forward([exact], carry("forward exactly", state.double()))
    (rights,) = exactly.backward(
        [exact], [grad.double()], state.double(), carry("backward exactly", state.double())
    )
    errors["out"] = relative_error(out, right)
    for hopper in (False, True):
        # As on a Hopper with triton 3.6, whose kernel fla refuses to run.
        chunk_o.IS_NVIDIA_HOPPER = chunk_o.TRITON_ABOVE_3_4_0 = hopper
        chunk_o.TRITON_ABOVE_3_7_1 = not hopper
        (grads,) = kernel.backward([x], [grad], state, carry("backward", state))
        for name, ours, right in zip(grads._fields, grads, rights, strict=True):
            errors[f"{name}, guarded {hopper}"] = relative_error(ours, right)
    for way in ("forward", "backward"):
        errors[f"summary {way}"] = relative_error(seen[way], seen[f"{way} exactly"])
    print(json.dumps(errors))


def relative_error(ours: Tensor, right: Tensor) -> float:
    return float((ours - right).abs().max() / right.abs().max())


if __name__ == "__main__":
    main()
