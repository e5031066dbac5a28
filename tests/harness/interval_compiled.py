"""Compile attention's kernels for a GPU that is not there, just as they are launched.

    python -m tests.harness.interval_compiled bfloat16,128,128 float32,96,80,30.0
    python -m tests.harness.interval_compiled a100:bfloat16,64,64,0.0,table,slope

Triton is given a GPU that names its capability and does nothing: forward and backward launch as
they would, on empty CPU tensors, up to the point where the binary would be loaded. Prints what
each kernel uses: registers per thread, bytes of stack (what was spilled) and of shared memory.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import code_generator
from triton.runtime import driver

from dtcp.kernels import triton_support
from dtcp.kernels.softmax.score_bias import ScoreBias
from dtcp.kernels.softmax.triton.attention import TritonAttention
from dtcp.kernels.softmax.types import (
    GradAccumulators,
    Keys,
    OnlineSoftmax,
    Queries,
    SavedForward,
    SoftmaxParams,
)

TOKENS, HEADS, KV_HEADS = 256, 4, 2
BIASES = {
    "table": (HEADS, 257),
    "slope": (HEADS,),
    "relative": (1, TOKENS, HEADS, 16),
    "profiles": (16, 512),
}
"""Shapes of what a score bias is made of, by name."""


class Gpu(NamedTuple):
    """What a kernel is compiled for."""

    capability: int
    shared: int  # bytes that a block of threads may have


GPUS = {
    "h100": Gpu(90, 227 * 1024),
    "b200": Gpu(100, 227 * 1024),
    "a100": Gpu(80, 163 * 1024),
    "rtx": Gpu(89, 99 * 1024),
    "rtx50": Gpu(120, 99 * 1024),
}


class Used(NamedTuple):
    """What a kernel uses."""

    registers: int
    stack: int
    shared: int


class RecordingLoader:
    """Takes the binaries that Triton would load, and records what they use."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.used: dict[str, Used] = {}
        self.loaded = 0

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, ...]:
        self.loaded += 1
        self.used[name] = Used(*registers_and_stack(binary), shared)
        return 0, 0, self.used[name].registers, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": self.gpu.shared}


class NoGpu:
    """A driver of some GPU, whose launches do nothing."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu, self.utils = gpu, RecordingLoader(gpu)

    def get_current_device(self) -> int:
        # Triton compiles for a device once: every GPU is one of its own.
        return self.gpu.capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.gpu.capability, 32)

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *launch: None


def registers_and_stack(binary: bytes) -> tuple[int, int]:
    """Registers per thread and bytes of stack, by the tool that Triton ships."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        usage = subprocess.check_output([tool, "--dump-resource-usage", file.name], text=True)
    match = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert match, usage
    return int(match[1]), int(match[2])


def launch(
    dtype: torch.dtype, key_dim: int, value_dim: int, softcap: float, biases: Collection[str] = ()
) -> None:
    """Forward and backward, as attend and attend_backward launch them.

    Args:
        biases: of BIASES, but for profiles, which come with relative.
    """
    rows = {"q": (HEADS, key_dim), "k": (KV_HEADS, key_dim), "v": (KV_HEADS, value_dim)}
    q, k, v = (torch.empty(1, TOKENS, *row, dtype=dtype) for row in rows.values())
    dq, dk, dv = (torch.empty(x.shape) for x in (q, k, v))
    out = torch.empty(1, TOKENS, HEADS, value_dim, dtype=dtype)
    index = torch.zeros(1, TOKENS, dtype=torch.int32)
    bias = None
    if biases:
        given = {*biases, "profiles"} if "relative" in biases else {*biases}
        parts = (torch.empty(size) if name in given else None for name, size in BIASES.items())
        bias = ScoreBias(*parts, query_index=index[0], dtype=dtype)
    queries, keys = Queries(q, index, index, bias), Keys(k, v, index[0])
    kernel, params = TritonAttention(), SoftmaxParams(0.1, softcap)
    state = OnlineSoftmax.empty(q, value_dim)
    kernel.attend(state, queries, keys, params)
    saved = SavedForward(out, out, state.lse)
    kernel.attend_backward(GradAccumulators(dq, dk, dv), saved, queries, keys, params)


def unwrap_as_in_3_6(x: Any) -> Any:
    """What a kernel compares: a tuple that holds None is an error of Triton 3.6, torch 2.11's."""
    for each in x.values if isinstance(x, tl.tuple) else ():
        assert (each.value if isinstance(each, tl.constexpr) else each) is not None
    return unwrap(x)


unwrap = code_generator._unwrap_if_constexpr


def pretend(gpu: NoGpu) -> None:
    """Let kernels be chosen and compiled for it."""
    code_generator._unwrap_if_constexpr = unwrap_as_in_3_6
    driver.set_active(gpu)
    triton_support.shared_memory = lambda x: gpu.gpu.shared
    triton_support.capability_major = lambda x: gpu.gpu.capability // 10


def main() -> None:
    for wanted in sys.argv[1:]:
        name, _, shape = wanted.rpartition(":")
        dtype, key_dim, value_dim, *rest = shape.split(",")
        gpu = NoGpu(GPUS[name or "h100"])
        pretend(gpu)
        softcap = float(*rest[:1] or (0.0,))
        launch(getattr(torch, dtype), int(key_dim), int(value_dim), softcap, rest[1:])
        kernels = {name: used._asdict() for name, used in gpu.utils.used.items()}
        print(json.dumps({"wanted": wanted, "kernels": kernels}), flush=True)


if __name__ == "__main__":
    main()
