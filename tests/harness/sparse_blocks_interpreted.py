"""Run attention to picked blocks in Triton's interpreter, at published widths, against fp64.

A key and a value of 256 channels (MiniMax-M3's: 128) are one entry of 512, and a query is 0 where
the value is. Prints, for Qwen4's and for MiniMax-M3's, the largest error of each result, divided by
its largest value, and how many tokens differ of those that are picked. The truth is the mixer's in
plain torch, which tests hold to dense attention.
"""

import json

import torch
from torch import Tensor

from dtcp.kernels.triton_support import triton_runs_on
from dtcp.mixer_metadata import batch_metadata
from dtcp.sequence.documents import Documents
from dtcp.sparse_blocks import BlockIndex, ScoredBlockAttention, ScoreIndex, SparseBlockAttention
from tests.harness.interpreter import patch_language_once_a_launch
from tests.harness.sparse_interpreted import relative_error

HEADS, INDEX = 2, 8
DOCUMENTS = Documents(((9, 2, 20), (32,)), 32)


def results(dtype: torch.dtype, *, scored: bool) -> tuple[Tensor, ...]:
    """What is picked, the output, and the gradients of q, k and v."""
    draw = torch.Generator().manual_seed(0)
    mixer = ScoredBlockAttention(2, 4, 1) if scored else SparseBlockAttention(2, 4)
    dim = 128 if scored else 256

    def rows(*shape: int) -> Tensor:
        x = torch.randn(2, 32, *shape, generator=draw, dtype=torch.float64).float()
        return x.to(dtype).requires_grad_()

    q, k, v = rows(HEADS, dim), rows(1, dim), rows(1, dim)
    # Whole numbers, of which scores are exact in any dtype.
    key, index_q = rows(INDEX).round(), rows(4, INDEX).round()
    index: BlockIndex | ScoreIndex = BlockIndex(index_q, key, key, lambda mean, _: mean)
    if scored:
        index = ScoreIndex(index_q[:, :, :1], key)
    metadata = batch_metadata(mixer, DOCUMENTS)
    out = mixer(q, k, v, index, metadata)
    grad = torch.randn(out.shape, generator=draw, dtype=torch.float64).float().to(dtype)
    return mixer.select(index, mixer.own(metadata)), out, *torch.autograd.grad(out, (q, k, v), grad)


def main() -> None:
    assert triton_runs_on(torch.empty(0)) and not triton_runs_on(torch.empty(0).double())
    patch_language_once_a_launch()
    for scored in (False, True):
        dtypes = torch.float32, torch.float64
        (picked, *ours), (right_picked, *right) = (results(x, scored=scored) for x in dtypes)
        names = ("out", "dq", "dk", "dv")
        errors = {n: relative_error(*pair) for n, *pair in zip(names, ours, right, strict=True)}
        print(json.dumps({"picked": int((picked != right_picked).sum()), **errors}))


if __name__ == "__main__":
    main()
