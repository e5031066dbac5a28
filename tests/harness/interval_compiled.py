"""Compile the interval kernels for a GPU that is not there, just as they are launched.

    python -m tests.harness.interval_compiled bfloat16,128,128 float32,96,80,30.0

Triton is given a GPU that says what it is and does nothing: the launches of forward and backward
run as they would, on empty CPU tensors, up to the point where the binary would be loaded. Prints
what each kernel takes: registers a thread, bytes of stack (what was spilled), of shared memory.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from dtcp.kernels import triton_support
from dtcp.kernels.softmax.triton import attention as interval
from dtcp.kernels.softmax.types import (
    GradAccumulators,
    Keys,
    OnlineSoftmax,
    Queries,
    SavedForward,
    SoftmaxParams,
)

TOKENS, HEADS, KV_HEADS = 256, 4, 2


class Gpu(NamedTuple):
    """What a kernel is compiled for."""

    capability: int
    shared: int  # bytes that a block of threads may have


GPUS = {"h100": Gpu(90, 227 * 1024), "a100": Gpu(80, 163 * 1024), "rtx": Gpu(89, 99 * 1024)}


class Used(NamedTuple):
    """What a kernel takes."""

    registers: int
    stack: int
    shared: int


class Loads:
    """Where binaries go; they are weighed."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.found: dict[str, Used] = {}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, ...]:
        self.found[name] = Used(*weigh(binary), shared)
        return 0, 0, self.found[name].registers, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": self.gpu.shared}


class NoGpu:
    """A driver of some GPU, whose launches do nothing."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu, self.utils = gpu, Loads(gpu)

    def get_current_device(self) -> int:
        # Triton compiles for a device once: every GPU is one of its own.
        return self.gpu.capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.gpu.capability, 32)

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *launch: None


def weigh(binary: bytes) -> tuple[int, int]:
    """Registers a thread and bytes of stack, by the tool that Triton brings."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        said = subprocess.check_output([tool, "--dump-resource-usage", file.name], text=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    assert found, said
    return int(found[1]), int(found[2])


def launch(dtype: torch.dtype, key_dim: int, value_dim: int, softcap: float) -> None:
    """Forward and backward, as attend and attend_backward do it."""
    rows = {"q": (HEADS, key_dim), "k": (KV_HEADS, key_dim), "v": (KV_HEADS, value_dim)}
    q, k, v = (torch.empty(1, TOKENS, *row, dtype=dtype) for row in rows.values())
    dq, dk, dv = (torch.empty(x.shape) for x in (q, k, v))
    out = torch.empty(1, TOKENS, HEADS, value_dim, dtype=dtype)
    index = torch.zeros(1, TOKENS, dtype=torch.int32)
    queries, keys, how = Queries(q, index, index), Keys(k, v, index[0]), SoftmaxParams(0.1, softcap)
    partial = OnlineSoftmax.empty(q, value_dim)
    interval.attend(partial, queries, keys, index, how)
    final = SavedForward(out, out, partial.lse)
    interval.attend_backward(GradAccumulators(dq, dk, dv), final, queries, keys, index, how)


def main() -> None:
    for wanted in sys.argv[1:]:
        name, _, shape = wanted.rpartition(":")
        dtype, key_dim, value_dim, *softcap = shape.split(",")
        gpu = NoGpu(GPUS[name or "h100"])
        driver.set_active(gpu)
        triton_support._shared_memory = lambda x, gpu=gpu: gpu.gpu.shared
        launch(getattr(torch, dtype), int(key_dim), int(value_dim), float(*softcap or (0.0,)))
        found = {name: used._asdict() for name, used in gpu.utils.found.items()}
        print(json.dumps({"wanted": wanted, "kernels": found}), flush=True)


if __name__ == "__main__":
    main()
