"""Compile sparse attention's kernels for a GPU that is not there, just as they are launched.

    python -m tests.harness.sparse_compiled a100:bfloat16,64,512+64,512 bfloat16,64,128

One line per argument: GPU (h100 if left out), dtype, heads, channels (of values, and those behind
them), selected entries (0: runs of entries). Without the last: an indexer's kernel. See
interval_compiled.py.
"""

import json
import sys

import torch

from dtcp.kernels.sparse.blocks import sparse_fit
from dtcp.kernels.sparse.triton.attention import TritonSparseAttention
from dtcp.kernels.sparse.triton.index_scores import index_scores
from dtcp.kernels.sparse.types import SparseKeys
from dtcp.sequence.coords import Coords
from dtcp.sequence.documents import Documents
from dtcp.sparse.mixer import Compression, sparse_metadata
from tests.harness.interval_compiled import GPUS, NoGpu, pretend

ENTRIES = 2048


def launch(dtype: torch.dtype, heads: int, value_dim: int, others: int, num_selected: int) -> int:
    """Forward and backward, as the op launches them; the shared memory that their table states."""
    dim = value_dim + others
    coords = Coords.of(Documents.single(1, ENTRIES))
    attn_metadata = sparse_metadata(coords, [[(0, ENTRIES)]], 0, 128, Compression(1), halo=False)
    q, rows = torch.empty(1, ENTRIES, heads, dim, dtype=dtype), torch.empty(1, ENTRIES, dim)
    selected = None
    if num_selected:
        selected = torch.zeros(1, ENTRIES, num_selected, dtype=torch.int32)
    rows = rows.to(dtype)
    keys = SparseKeys(rows, rows, selected, attn_metadata.sight, value_dim)
    kernel, sink = TritonSparseAttention(), torch.zeros(heads)
    out, lse = kernel.forward(q, keys, sink, 0.1)
    kernel.backward(out, q, keys, sink, out, lse, 0.1)
    fit = sparse_fit(q, value_dim)
    assert fit is not None
    return fit.shared


def launch_index(dtype: torch.dtype, heads: int, dim: int) -> None:
    """Of queries and keys that are cut anywhere, as blocks of an indexer are."""
    q, weight, keys = (
        torch.empty(ENTRIES, *shape, dtype=dtype) for shape in ((heads, dim), (heads,), (dim,))
    )
    token = torch.arange(ENTRIES, dtype=torch.int32)
    for start, low in ((0, 0), (64, 128), (70, 3), (ENTRIES - 1, 16)):
        of_queries = (0 * token[start:], token[start:])
        index_scores(q[start:], weight[start:], keys[low:], *of_queries, token[low:])


def main() -> None:
    for wanted in sys.argv[1:]:
        name, _, call = wanted.rpartition(":")
        dtype, heads, dim, *num_selected = call.split(",")
        gpu, stated = NoGpu(GPUS[name or "h100"]), None
        pretend(gpu)
        value_dim, _, others = dim.partition("+")
        if num_selected:
            sizes = (int(heads), int(value_dim), int(others or 0), int(num_selected[0]))
            stated = launch(getattr(torch, dtype), *sizes)
        else:
            launch_index(getattr(torch, dtype), int(heads), int(dim))
        kernels = {name: used._asdict() for name, used in gpu.utils.used.items()}
        report = {"wanted": wanted, "stated": stated, "loaded": gpu.utils.loaded}
        print(json.dumps({**report, "kernels": kernels}), flush=True)


if __name__ == "__main__":
    main()
