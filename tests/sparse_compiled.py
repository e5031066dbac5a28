"""Compile sparse attention's kernels for sm_90, with no GPU: a script, for test_sparse_gpu.py.

    python -m tests.sparse_compiled [--all]

Prints bytes of shared memory; with --all of every plan, with registers and spilled bytes.
"""

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dtcp.kernels import sparse_gpu
from dtcp.kernels import sparse_triton as forward
from dtcp.kernels import sparse_triton_backward as backward
from dtcp.kernels.sparse_gpu import Blocks, Call
from dtcp.kernels.sparse_triton import Given, Shape, Sizes, View
from dtcp.kernels.sparse_triton_backward import Final

HOPPER = GPUTarget("cuda", 90, 32)
DTYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
INT32 = "*i32"


def compiled(kernel: Any, dtype: torch.dtype, block: Blocks, shape: Shape) -> Any:
    """The kernel, as a launch with aligned tensors and strides would have it."""
    x = DTYPES[dtype]
    view = View(x, ("i32", "i32", "i32"))
    types = {
        "q": view,
        "sink": "*fp32",
        "final": Final(view, view, "*fp32", "*fp32"),
        "given": Given(x, x, INT32, INT32, INT32, INT32),
        "keys": x,
        "readers": INT32,
        "out": x,
        "lse": "*fp32",
        "dq": x,
        "dentries": "*fp32",
        "found": "*fp32",
        "sizes": Sizes(*["i32"] * 5),
        "scale": "fp32",
        "shape": "constexpr",
    }
    signature = {name: types[name] for name in kernel.arg_names}
    aligned = dict(_aligned(list(signature.values())))
    fixed = {"shape": shape}
    source = ASTSource(kernel, signature, constexprs=fixed, attrs=aligned)
    options = {"num_warps": block.warps, "num_stages": block.stages}
    return triton.compile(source, target=HOPPER, options=options)


def _aligned(types: Any, path: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], Any]]:
    """Pointers and numbers are multiples of 16, as they are at the sizes of Flash."""
    for place, kind in enumerate(types):
        if isinstance(kind, tuple):
            yield from _aligned(kind, (*path, place))
        elif kind.startswith("*") or kind == "i32":
            yield (*path, place), [["tt.divisibility", 16]]


def variants(dtype: torch.dtype, dim: int) -> Iterator[tuple[str, Any, Blocks, Shape]]:
    """Every kernel, reading picks before reading runs, of 64 heads and more."""
    plan = sparse_gpu.plan_for(dtype, dim)
    for picks, entries in ((True, True), (False, True), (False, False)):
        sizes = Sizes(1024, 64, 1024, 1024, 512)
        call = Call(Given(*[None] * 6), sizes, 1, dim, True, entries, picks)
        reads = "picks" if picks else "runs" if entries else "a window"
        for kernel, block in (
            (forward.attend, plan.forward),
            (backward.query_gradients, plan.queries),
        ):
            yield reads, kernel, block, call.shape(block, dtype=dtype, picks=picks)
    yield (
        "readers",
        backward.run_gradients,
        plan.keys,
        call.shape(plan.keys, dtype=dtype, picks=False),
    )
    yield (
        "heads",
        backward.pick_gradients,
        plan.keys,
        call.shape(plan.keys, dtype=dtype, picks=True),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true")
    if parser.parse_args().all:
        for dtype in DTYPES:
            for dim in (512, 128):
                for reads, kernel, block, shape in variants(dtype, dim):
                    found = compiled(kernel, dtype, block, shape)
                    print(dtype, dim, kernel.fn.__name__, reads, block, _usage(found), flush=True)
        return
    shared: dict[str, int] = {}
    for _, kernel, block, shape in variants(torch.bfloat16, 512):
        name = kernel.fn.__name__
        if name not in shared:
            shared[name] = compiled(kernel, torch.bfloat16, block, shape).metadata.shared
    print(json.dumps(shared))


def _usage(found: Any) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(found.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return f"{registers} registers, {stack} spilled, {found.metadata.shared} shared"


if __name__ == "__main__":
    main()
