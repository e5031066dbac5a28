"""The time of DeepSeek-V3.2's attention on the last of several ranks: indexer and attention.

Work forward is 2 (576 + 512) operations per head, query and token that it picked, 2.5 times that
backward, and 2 x 128 per head of the indexer for each token that a query may pick.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from benchmarks.gpu.timing import seconds_of
from dtcp.kernels.sparse.api import SparseKeys, sparse_kernel
from dtcp.kernels.sparse.index_kernel import index_kernel
from dtcp.kernels.sparse.indexer import top_entries
from dtcp.sequence.coords import Coords
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import Contiguous
from dtcp.sparse_latent import SparseLatentAttention, SparseLatentCP


class LatentSizes(NamedTuple):
    """Of a layer; those published unless said otherwise."""

    heads: int = 128
    latent: int = 512
    rotary: int = 64
    index_heads: int = 64
    index_dim: int = 128
    selected: int = 2048


PUBLISHED = LatentSizes()


def picked_latents(
    device: str, length: int, sizes: LatentSizes = PUBLISHED, ranks: int = 8
) -> Callable[[], dict[str, Any]]:
    """Of the rank that has the last tokens of a row, and so the most to pick from."""

    def run() -> dict[str, Any]:
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        coords, mixer = Coords.of(Documents.single(1, length)), SparseLatentAttention()
        layout = Contiguous(length, ranks)
        sight = SparseLatentCP().make_metadata(mixer, coords, layout, ranks - 1).to(device).sight
        rows, queries, tokens = *sight.first.shape, sight.closing.shape[1]
        heads, latent, rotary, index_heads, index_dim, selected = sizes

        def noise(*shape: int) -> torch.Tensor:
            return torch.randn(rows, *shape, device=device, dtype=dtype)

        index = (noise(queries, index_heads, index_dim), noise(queries, index_heads))
        index = (*index, noise(tokens, index_dim))
        seen = (sight.first, sight.last, sight.closing, sight.tiles, selected)
        places = top_entries(*index, *seen)
        q, entries = noise(queries, heads, latent + rotary), noise(tokens, latent + rotary)
        given = SparseKeys(entries[:, :0], entries, places, sight, latent)
        grad, scale = noise(queries, heads, latent), (latent + rotary) ** -0.5
        kernel = sparse_kernel(q, given)
        out, lse = kernel.forward(q, given, None, scale)
        saved = (grad, q, given, None, out, lse, scale)
        calls = {
            "indexer": lambda: top_entries(*index, *seen),
            "forward": lambda: kernel.forward(q, given, None, scale),
            "backward": lambda: kernel.backward(*saved),
        }
        if device == "cuda":
            _without_waiting(calls)
        times = {name: seconds_of(call, q.device) for name, call in calls.items()}
        work = 2.0 * rows * queries * heads * min(selected, tokens) * (2 * latent + rotary)
        scored = 2.0 * rows * queries * index_heads * index_dim * (tokens - queries / 2)
        operations = {"indexer": scored, "forward": work, "backward": 2.5 * work}
        return {
            "kernel": type(kernel).__name__,
            "index_kernel": index_kernel(*index[::2]) is not None,
            **{f"{name}_ms": 1e3 * x for name, x in times.items()},
            **{f"{name}_tflops": operations[name] / x / 1e12 for name, x in times.items()},
        }

    return run


def _without_waiting(calls: dict[str, Callable[[], object]]) -> None:
    """Raise where the host waits for the GPU."""
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for call in calls.values():
            call()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
