"""An indexer's scores by a kernel: which one is chosen, and what is picked of all at once."""

import pytest
import torch

from dtcp.kernels.sparse import index_kernel, indexer
from dtcp.sequence.coords import Coords
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import Contiguous, HeadTail
from dtcp.sparse.mixer import Compression
from dtcp.sparse.style import rank_metadata
from dtcp.sparse_latent import SparseLatentAttention, SparseLatentCP

CPU = torch.device("cpu")
ROWS = Documents(((150, 2, 200), (400,)), 400)


@pytest.mark.parametrize("number", [1, 9, 160])
@pytest.mark.parametrize("layout", [Contiguous(400, 2), HeadTail(400, 2)])
def test_all_scores_at_once_pick_what_steps_pick(layout, number, monkeypatch):
    """Of tokens and of pooled entries, many of equal scores, however blocks are joined and cut."""
    coords = Coords.of(ROWS)
    tokens = SparseLatentCP().make_metadata(SparseLatentAttention(), coords, layout, 1)
    pooled = rank_metadata(coords, layout, 1, 5, Compression(2, selected=number))
    blocks = set()
    for sight in (tokens.sight, pooled.sight):
        draw = torch.Generator().manual_seed(0)
        rows, queries, entries = *sight.first.shape, sight.closing.shape[1]
        q, weight, keys = (
            torch.randint(-2, 3, shape, generator=draw).double()
            for shape in ((rows, queries, 3, 4), (rows, queries, 3), (rows, entries, 4))
        )
        seen = (sight.first, sight.last, sight.closing, sight.tiles, number)
        right = indexer.top_entries(q, weight, keys, *seen)
        assert (right >= 0).any()

        def scores(*given):
            blocks.add(given[0].shape[0])
            return index_kernel.plain_scores(*given)

        for most in (2**24, 70 * 200, 500):
            with monkeypatch.context() as patch:
                patch.setattr(indexer, "index_kernel", lambda q, keys: scores)
                patch.setattr(indexer, "MAX_INDEX_SCORES", most)
                assert torch.equal(indexer.top_entries(q, weight, keys, *seen), right)
    # Queries that were scored together: tiles have at most 64.
    assert min(blocks) < 8 and (max(blocks) > 64 or number == 160)


def test_blocks_are_joined_where_they_see_the_same():
    blocks = [
        indexer._Block(*x)
        for x in ((0, 64, 0, 64), (64, 128, 0, 128), (128, 192, 130, 192), (192, 200, 130, 200))
    ]
    assert indexer._joined(blocks, 40) == [(0, 128, 0, 128), (128, 200, 130, 200)]
    assert indexer._joined(blocks, 64) == [(0, 64, 0, 64), *blocks[1:]]


def test_the_kernel_says_what_it_does_not_take(monkeypatch, caplog):
    q, keys = torch.empty(2, 5, 64, 128), torch.empty(2, 9, 128)
    assert "runs on GPUs" in index_kernel.refusal_of_index(q, keys)
    assert index_kernel.index_kernel(q, keys) is None
    monkeypatch.setattr(index_kernel, "triton_runs_on", lambda _: True)
    assert index_kernel.refusal_of_index(q, keys) is None
    assert "of one dtype" in index_kernel.refusal_of_index(q, keys.half())
    for wide in (torch.empty(2, 5, 65, 128), torch.empty(2, 5, 64, 129)):
        assert "at most 64 heads of at most 128" in index_kernel.refusal_of_index(wide, keys)
    with caplog.at_level("WARNING", "dtcp.kernels"):
        index_kernel._say_plain_torch(torch.bfloat16, 65, 128, "takes at most 64 heads")
    assert "(65 heads of 128, bfloat16) are computed by plain torch" in caplog.text


def test_wrong_scores_are_found_before_they_are_used():
    asked = (torch.bfloat16, CPU, 3, 16)
    right = index_kernel.plain_scores
    assert index_kernel.fault_of_index(lambda: right, *asked) is None

    def blind(q, weight, keys, first, last, closing):
        return right(q, weight, keys, first, last - 1, closing)

    def seeing(q, weight, keys, first, last, closing):
        return right(q, weight, keys, first, last + 1, closing)

    for wrong in (lambda *given: 1.1 * right(*given), blind, seeing):
        fault = index_kernel.fault_of_index(lambda wrong=wrong: wrong, *asked)
        assert fault is not None and "in scores" in fault
