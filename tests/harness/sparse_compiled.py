"""Compile sparse attention's kernels for an H100 or H200 without one, just as they are launched.

    python -m tests.harness.sparse_compiled bfloat16,64,512,512 float32,64,512,0

A line for each dtype, heads, channels and picks (0: runs of entries): see interval_compiled.py.
"""

import json
import sys

import torch
from triton.runtime import driver

from dtcp.kernels.sparse.reference import Gathered
from dtcp.kernels.sparse.triton.attention import sparse_backward, sparse_forward
from dtcp.sequence.documents import Documents
from dtcp.sequence.masks import Coords
from dtcp.sparse.mixer import Compression, sparse_metadata
from tests.harness.interval_compiled import GPUS, NoGpu

ENTRIES = 2048


def launch(dtype: torch.dtype, heads: int, dim: int, picks: int) -> None:
    """Forward and backward, as the op does it."""
    coords = Coords.of(Documents.single(1, ENTRIES))
    attn_metadata = sparse_metadata(coords, [[(0, ENTRIES)]], 0, 128, Compression(1), halo=False)
    q, rows = torch.empty(1, ENTRIES, heads, dim, dtype=dtype), torch.empty(1, ENTRIES, dim)
    selected = torch.zeros(1, ENTRIES, picks, dtype=torch.int32) if picks else None
    given = Gathered(rows.to(dtype), rows.to(dtype), selected, attn_metadata.sight)
    sink = torch.zeros(heads)
    out, lse = sparse_forward(q, given, sink, 0.1)
    sparse_backward(out, q, given, sink, out, lse, 0.1)


def main() -> None:
    gpu = NoGpu(GPUS["h100"])
    driver.set_active(gpu)
    for wanted in sys.argv[1:]:
        dtype, heads, dim, picks = wanted.split(",")
        gpu.utils.found.clear()
        launch(getattr(torch, dtype), int(heads), int(dim), int(picks))
        found = {name: used._asdict() for name, used in gpu.utils.found.items()}
        print(json.dumps({"wanted": wanted, "kernels": found}), flush=True)


if __name__ == "__main__":
    main()
