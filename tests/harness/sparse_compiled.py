"""Compile sparse attention's kernels for an H100 or H200 without one, just as they are launched.

    python -m tests.harness.sparse_compiled bfloat16,64,512,512 float32,64,512,0

One line per argument: dtype, heads, channels, selected entries (0: runs of entries). See
interval_compiled.py.
"""

import json
import sys

import torch
from triton.runtime import driver

from dtcp.kernels.sparse.triton.attention import TritonSparseAttention
from dtcp.kernels.sparse.types import SparseKeys
from dtcp.sequence.coords import Coords
from dtcp.sequence.documents import Documents
from dtcp.sparse.mixer import Compression, sparse_metadata
from tests.harness.interval_compiled import GPUS, NoGpu

ENTRIES = 2048


def launch(dtype: torch.dtype, heads: int, dim: int, num_selected: int) -> None:
    """Forward and backward, as the op launches them."""
    coords = Coords.of(Documents.single(1, ENTRIES))
    attn_metadata = sparse_metadata(coords, [[(0, ENTRIES)]], 0, 128, Compression(1), halo=False)
    q, rows = torch.empty(1, ENTRIES, heads, dim, dtype=dtype), torch.empty(1, ENTRIES, dim)
    selected = None
    if num_selected:
        selected = torch.zeros(1, ENTRIES, num_selected, dtype=torch.int32)
    keys = SparseKeys(rows.to(dtype), rows.to(dtype), selected, attn_metadata.sight)
    kernel, sink = TritonSparseAttention(), torch.zeros(heads)
    out, lse = kernel.forward(q, keys, sink, 0.1)
    kernel.backward(out, q, keys, sink, out, lse, 0.1)


def main() -> None:
    gpu = NoGpu(GPUS["h100"])
    driver.set_active(gpu)
    for wanted in sys.argv[1:]:
        dtype, heads, dim, num_selected = wanted.split(",")
        gpu.utils.used.clear()
        launch(getattr(torch, dtype), int(heads), int(dim), int(num_selected))
        kernels = {name: used._asdict() for name, used in gpu.utils.used.items()}
        print(json.dumps({"wanted": wanted, "kernels": kernels}), flush=True)


if __name__ == "__main__":
    main()
