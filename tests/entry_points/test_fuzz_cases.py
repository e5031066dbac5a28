"""What the fuzzer found, by name: rows A6 and A9 of the list of faults, and their siblings."""

import pytest
import torch

from dtcp.batch import shard_batch
from dtcp.cp_utils import build_dsv4_cp_causal_padding_mask
from dtcp.cp_utils.masks import documents_of_mask
from dtcp.cp_utils.validation import check_rows, padding_of_mask
from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.kernels.softmax.block_ranges import block_ranges
from dtcp.labels import shift_labels
from dtcp.loss import token_mean_loss
from dtcp.mixer_metadata import batch_metadata
from dtcp.recurrent import CausalConv1d
from dtcp.sequence.block_balanced import BlockBalanced, block_work
from dtcp.sequence.block_runs import vision_blocks
from dtcp.sequence.coords import Coords
from dtcp.sequence.documents import Documents
from dtcp.sequence.key_intervals import KeyIntervals
from dtcp.sequence.layout import Contiguous, HeadTail
from dtcp.sequence.masks import Causal, SlidingWindow
from dtcp.sequence.per_document import PerDocument
from dtcp.sequence.prefix_masks import PrefixLM
from dtcp.sequence.routes import halo_runs, rolled
from dtcp.softmax.mixer import SoftmaxAttention
from dtcp.softmax.required_keys import required_keys
from dtcp.sparse.mixer import CompressedSparseAttention, Compression, Prepool
from dtcp.thd import thd_layout, to_thd
from tests.harness.row_ids import of_row

THD = {
    "input_ids": torch.zeros(1, 8).long(),
    "labels": torch.zeros(1, 8).long(),
    "seq_lens": torch.tensor([[3, 4]]),
    "seq_lens_padded": torch.tensor([[4, 4]]),
}
TWO = Documents(((3, 4), (7,)), 8)


@pytest.mark.parametrize(
    ("cu_seqlens", "error"),
    [
        ([1, 5, 9], ValueError),
        ([-1, 5, 9], ValueError),
        ([0, 5, 4], ValueError),
        ([0, 5, 5], ValueError),
        ([0, 5, 13], ValueError),
        ([0, 5, 9, -1, -1], ValueError),
        ([], ValueError),
        ([0.0, 5.0], TypeError),
        ([False, True], TypeError),
        ([0, None], TypeError),
        (None, TypeError),
        (torch.tensor([[0, 5]]), ValueError),
        (torch.tensor([0.0, 5.0]), TypeError),
        (torch.tensor([False, True]), TypeError),
        (torch.tensor([0, 5, -1]), ValueError),
    ],
    ids=lambda x: f"A6-{x.tolist()}" if isinstance(x, torch.Tensor) else f"A6-{x}",
)
def test_boundaries_that_are_none_are_refused(cu_seqlens, error):
    with pytest.raises(error, match=r"got (cu_seqlens|\d+ tokens)"):
        Documents.from_cu_seqlens(cu_seqlens, 12)


@pytest.mark.parametrize(
    "container", [list, tuple, torch.tensor, torch.IntTensor], ids=of_row("A6")
)
def test_boundaries_are_read_in_any_container(container):
    assert Documents.from_cu_seqlens(container([0, 5, 9]), 12) == Documents(((5, 4),), 12)


def prefix_with(row, token, value):
    prefix = torch.tensor([[2, 2, 2, 1, 1, 1, 1, 0], [3] * 7 + [0]])
    prefix[row, token] = value
    return prefix


@pytest.mark.parametrize(
    ("row", "token", "value"),
    [(0, 1, 0), (0, 4, 2), (1, 6, 4), (0, 0, 1), (1, 3, -1)],
    ids=lambda x: f"A6-{x}",
)
def test_a_prefix_that_varies_inside_a_document_is_refused(row, token, value):
    coords = Coords.of(TWO, prefix=prefix_with(row, token, value))
    for mask in (PrefixLM(), PrefixLM() & SlidingWindow(4), Causal() | PrefixLM()):
        with pytest.raises(ValueError, match=rf"one prefix >= 0 .* got prefix\[{row}, "):
            mask.intervals(coords)


def test_the_prefix_of_padding_is_not_read_A6():
    intervals = [
        PrefixLM().intervals(Coords.of(TWO, prefix=prefix_with(row, 7, value)))
        for row, value in ((0, 0), (0, 9), (1, -5))
    ]
    for first, last in intervals[1:]:
        assert first.equal(intervals[0][0]) and last.equal(intervals[0][1])


def test_a_negative_prefix_throughout_a_document_is_refused_A6():
    with pytest.raises(ValueError, match="one prefix >= 0"):
        PrefixLM().intervals(Coords.of(TWO, prefix=torch.full((2, 8), -1)))


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: HeadTail(8, 2).shard(torch.zeros(2, 8), 0, dim=2), ValueError, "dim=2: name"),
        (lambda: HeadTail(8, 2).shard(torch.zeros(2, 8), 0, dim=1.0), TypeError, "got dim=1.0"),
        (lambda: HeadTail(8, 2).shard([0] * 8, 0), TypeError, "got x of type list"),
        (lambda: HeadTail(8, 2).restore(torch.zeros(8)), ValueError, "dim=1: name"),
        (lambda: HeadTail(8, 2).runs(0.0), TypeError, "got rank=0.0"),
        (lambda: HeadTail(8, 2).token_indices("0"), TypeError, "got rank='0'"),
        (lambda: HeadTail(8, 2).permutation() if Contiguous(8, 2.0) else 0, TypeError, "2.0"),
        (lambda: PerDocument(8, 2, [3, 4]), TypeError, r"got lengths=\[3, 4\]"),
        (lambda: BlockBalanced(8, 2, 2, (0, 1, 1.0, 0)), TypeError, "got owners="),
        (lambda: BlockBalanced.for_batch(TWO.single(1, 2), 3), ValueError, "num_shards=3"),
        (lambda: HeadTail.for_batch(None, 2), TypeError, "got documents of type NoneType"),
        (lambda: Documents(((3, 4.0),), 8), TypeError, "whole tokens, got lengths="),
        (lambda: Documents([[3, 4]], 8), TypeError, "got lengths="),
        (lambda: Documents(((3, 4),), 8.0), TypeError, "got seq_len=8.0"),
        (lambda: Documents.single(-1, 8), ValueError, "got batch=-1"),
        (
            lambda: Documents.from_position_ids(torch.zeros(2, 0, dtype=torch.int64)),
            ValueError,
            r"position_ids\.shape=\(2, 0\): leave empty rows out",
        ),
        (
            lambda: Documents.from_position_ids(torch.zeros(2, 3)),
            TypeError,
            r"position_ids\.dtype=torch\.float32",
        ),
        (
            lambda: Documents.from_padded(None, torch.zeros(2, 3)),
            TypeError,
            r"padding\.dtype=torch\.float32: convert it to bool",
        ),
        (
            lambda: Documents.from_padded(None, torch.zeros(2, 3, dtype=torch.uint8)),
            TypeError,
            r"padding\.dtype=torch\.uint8",
        ),
        (lambda: Documents.from_padded(None, torch.zeros(3) > 0), ValueError, r"shape=\(3,\)"),
        (
            lambda: Documents.of_batch(3, 4, position_ids=torch.tensor([[0, 1, 0, 1]] * 2)),
            ValueError,
            r"position_ids\.shape=\(2, 4\) for 3 rows of 4",
        ),
        (
            lambda: Documents.of_batch(2, 4, padding_mask=torch.zeros(2, 5)),
            ValueError,
            r"padding_mask\.shape=\(2, 5\) for 2 rows of 4",
        ),
        (lambda: SlidingWindow(1.5), TypeError, "got size=1.5"),
        (lambda: Causal() & None, TypeError, "combined with another one, got None"),
        (
            lambda: Coords.of(TWO, block=torch.zeros(2, 8)),
            TypeError,
            r"block\.dtype=torch\.float32",
        ),
        (lambda: vision_blocks(torch.zeros(8)), ValueError, r"mm_token_type_ids\.shape=\(8,\)"),
        (lambda: halo_runs(HeadTail(8, 2), 0, left=-1, right=0), ValueError, "got left=-1"),
        (lambda: rolled([(0, 2)], 1, 0), ValueError, "got seq_len=0"),
        (lambda: block_work([1, 2], 1), TypeError, "got work of type list"),
        (lambda: shift_labels(torch.zeros(2, 8), TWO), ValueError, "ids of torch.float32"),
        (
            lambda: block_ranges(
                torch.zeros(1, 4).int(), torch.zeros(1, 4).int(), torch.arange(4), tile=0
            ),
            ValueError,
            "got tile=0",
        ),
        (
            lambda: required_keys(HeadTail(8, 2), 2, KeyIntervals.of(Causal(), Coords.of(TWO))),
            ValueError,
            "got rank=2",
        ),
        (
            lambda: required_keys(HeadTail(16, 2), 0, KeyIntervals.of(Causal(), Coords.of(TWO))),
            ValueError,
            r"whole rows, got 2 rows of \[8\] tokens",
        ),
        (lambda: to_thd(THD | {"seq_lens": torch.tensor([[3.0, 4.0]])}), TypeError, "float32"),
        (lambda: to_thd(THD | {"labels": [[0] * 8]}), TypeError, "got labels of type list"),
        (lambda: to_thd(None), TypeError, "got batch of type NoneType"),
        (lambda: thd_layout([1, 5, 9], 8, 1), ValueError, r"got cu_seqlens_padded=\[1, 5, 9\]"),
        (lambda: padding_of_mask(torch.ones(2, 8, 8) > 0), ValueError, r"shape \(2, 8, 8\)"),
        (lambda: check_rows({"input_ids": [[0]]}, "input_ids", ()), TypeError, "of type list"),
        (
            lambda: token_mean_loss(torch.zeros(2, 8, 3), torch.zeros(8, 2).long(), 16),
            ValueError,
            r"labels\.shape=\(8, 2\)",
        ),
        (
            lambda: token_mean_loss(torch.zeros(2, 8, 3), torch.zeros(2, 8), 16),
            TypeError,
            r"labels\.dtype=torch\.float32",
        ),
        (lambda: SoftmaxAttention("causal"), TypeError, "got mask='causal'"),
        (lambda: SoftmaxAttention(Causal(), softcap=-1.0), ValueError, "got softcap=-1.0"),
        (lambda: CausalConv1d(0), ValueError, "got width=0"),
        (
            lambda: build_dsv4_cp_causal_padding_mask(
                torch.arange(4), 4, torch.float32, "cpu", None, sliding_window=0
            ),
            ValueError,
            "got sliding_window=0",
        ),
    ],
    ids=of_row("A9"),
)
def test_a_call_is_refused_in_a_sentence(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_key_slots_that_hold_none_before_those_that_do_are_refused_A9():
    """Runs count slots: a key behind an unused slot was taken for the one before it."""
    first, last = torch.zeros(1, 4).int(), torch.arange(4)[None].int()
    with pytest.raises(ValueError, match="follow UNUSED"):
        block_ranges(first, last, torch.tensor([-1, 0, 1, 2]))


def test_an_inverted_mask_is_not_read_as_padding_A9():
    """Each token saw others and not itself, so all were padding: no loss, and not a word."""
    causal = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()
    assert documents_of_mask(causal, None, 2, 6) == Documents.single(2, 6)
    for read in (lambda mask: documents_of_mask(mask, None, 2, 6), padding_of_mask):
        with pytest.raises(ValueError, match=r"An attention_mask .* got attention_mask of shape"):
            read(~causal)


@pytest.mark.parametrize("shape", [(4, 6), (1, 6), (6,), (2, 3, 6)], ids=of_row("A9"))
def test_places_in_a_window_are_as_many_as_its_tokens(shape):
    """Their number was taken for the window's length: other entries were pooled."""
    mixer = CompressedSparseAttention(4, Compression(3), scale=1.0)
    metadata = batch_metadata(mixer, Documents.single(1, 12))
    q, keys = torch.randn(1, 12, 2, 6), torch.randn(1, 12, 6)
    tokens = Prepool(keys, keys, torch.randn(shape), lambda pooled, position_ids: pooled)
    with pytest.raises(ValueError, match=r"got tokens\.bias\.shape=.* give \(3, 6\)"):
        mixer(q, keys, metadata, sink=torch.zeros(2), tokens=tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool], ids=of_row("A6"))
@pytest.mark.parametrize("key", ["prefix", "block"])
def test_what_masks_read_of_a_batch_are_whole_numbers(key, dtype):
    """2.7 was taken for 2."""
    batch = {"input_ids": torch.zeros(1, 8).long(), key: torch.full((1, 8), 2.7).to(dtype)}
    with pytest.raises(TypeError, match=rf"got {key}\.dtype={dtype}"):
        shard_batch(batch, ParallelMesh(Degrees(), None, *[None] * 7))
