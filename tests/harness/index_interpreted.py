"""Run the indexer's kernel in Triton's interpreter: scores against dense fp64, and what is picked.

Triton reads TRITON_INTERPRET when it is imported, so this script runs in a process of its own.
Prints the largest error of the scores, then whether selections equal those of plain torch in fp64,
then what the self-test finds.
"""

import json
import tempfile
from math import inf
from pathlib import Path

import torch

from dtcp.kernels.sparse import indexer
from dtcp.kernels.sparse.index_kernel import fault_of_index, index_kernel, triton_scores
from dtcp.sequence.coords import Coords
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import Contiguous, HeadTail, SequenceLayout
from dtcp.sparse_latent import SparseLatentAttention, SparseLatentCP
from tests.harness.far_apart import far_apart
from tests.harness.interpreter import patch_language_once_a_launch

CASES: dict[str, tuple[SequenceLayout, int, int, int]] = {
    "head and tail": (HeadTail(160, 2), 1, 3, 24),
    "odd": (Contiguous(159, 3), 2, 17, 40),
}
"""A layout, a rank, heads and channels; blocks have 32 keys and 16 queries."""
SELECTED = 9


def compared(layout: SequenceLayout, rank: int, heads: int, dim: int) -> tuple[float, bool]:
    """Small whole numbers, so that many scores are equal and all of them exact."""
    length = layout.seq_len
    documents = Documents(((70, 2, 80), (length,)), length)
    mixer, coords = SparseLatentAttention(), Coords.of(documents)
    sight = SparseLatentCP().make_metadata(mixer, coords, layout, rank).sight
    draw = torch.Generator().manual_seed(0)
    rows, queries, keys = *sight.first.shape, sight.closing.shape[1]
    # Heads outermost in memory, as a projection by heads may leave them.
    q = torch.randint(-2, 3, (heads, rows, queries, dim), generator=draw).permute(1, 2, 0, 3)
    weight = torch.randint(-1, 3, (rows, queries, heads), generator=draw).float()
    key = torch.randint(-2, 3, (rows, keys, dim), generator=draw).float()
    q = q.float()
    assert index_kernel(q, key) is not None
    seen = (sight.first, sight.last, sight.closing)
    dense = torch.einsum("blhd,bpd->blhp", q.double(), key.double()).relu()
    dense = torch.einsum("blhp,blh->blp", dense, weight.double())
    index = sight.closing[:, None]
    hidden = (index < sight.first[..., None]) | (index > sight.last[..., None])
    dense = dense.masked_fill(hidden, -inf)
    made = [triton_scores()(*row) for row in zip(q, weight, key, *seen, strict=True)]
    error = (torch.stack(made).double() - dense).masked_fill(hidden, 0.0).abs().max()
    assert torch.equal(torch.stack(made) == -inf, hidden)
    wide = (x.double() for x in (q, weight, key))
    right = indexer.top_entries(*wide, *seen, sight.tiles, SELECTED)
    alike = True
    for most in (2**24, 70 * 80, 1000):
        indexer.MAX_INDEX_SCORES = most
        ours = indexer.top_entries(q, weight, key, *seen, sight.tiles, SELECTED)
        alike = alike and torch.equal(ours, right)
    indexer.MAX_INDEX_SCORES = 2**24
    return float(error), alike


def far_strides() -> bool:
    """Whether scores are the same where channels, heads or weights are far apart; NaN stays NaN."""
    draw = torch.Generator().manual_seed(0)
    q, weight, keys = (torch.randn(size, generator=draw) for size in ((3, 5, 24), (3, 5), (40, 24)))
    keys[7, 3] = torch.nan
    first, last = torch.zeros(3, dtype=torch.int32), torch.tensor([9, 20, 39], dtype=torch.int32)
    seen = (first, last, torch.arange(40, dtype=torch.int32))
    near = triton_scores()(q, weight, keys, *seen)
    assert near.isnan().any(1).all() and near.isnan().sum() == 3
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in "qhwk"]
        far = (
            (far_apart(q, 2, files[0]), weight, far_apart(keys, 1, files[3])),
            (far_apart(q, 1, files[1]), far_apart(weight, 1, files[2]), keys),
        )
        results = [triton_scores()(*each, *seen) for each in far]
    return all(torch.equal(each.nan_to_num(1.5), near.nan_to_num(1.5)) for each in results)


def main() -> None:
    patch_language_once_a_launch()
    results = {name: compared(*case) for name, case in CASES.items()}
    print(json.dumps({name: error for name, (error, _) in results.items()}))
    print(json.dumps({n: alike for n, (_, alike) in results.items()} | {"far": far_strides()}))
    asked = (torch.float32, torch.device("cpu"), 3, 24)
    wrong = fault_of_index(lambda: lambda *given: 1.1 * triton_scores()(*given), *asked)
    print(json.dumps({"right": fault_of_index(triton_scores, *asked), "wrong": wrong}))


if __name__ == "__main__":
    main()
