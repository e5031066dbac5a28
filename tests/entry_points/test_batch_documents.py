"""Whatever a batch says of its documents is exact, or refused by row and token.

Ids of tests start with the row of faults that they close: A5 documents that contradict position
ids, A11 the usual ways to give documents, B3 what the collators of transformers make.
"""

import pytest
import torch
from transformers import DataCollatorWithFlattening

from dtcp.batch import shard_batch
from dtcp.cp_utils.deepseek_v4_batch import make_dsv4_contiguous_shard_cp_batch_and_ctx
from dtcp.cp_utils.gemma4 import make_contiguous_shard_cp_batch_and_ctx
from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.huggingface import documents_of_hf_batch, shard_hf_batch
from dtcp.labels import IGNORED, shift_labels
from dtcp.rows import DEFAULT_FIELDS
from dtcp.sequence.documents import Documents
from dtcp.thd import to_thd
from tests.harness.hf_models import Placed

ONE_RANK = ParallelMesh(Degrees(), None, *[None] * 7)
PACKED = Documents(((3, 5), (4, 2)), 8)
WHOLE = Documents(((3, 5), (4, 4)), 8)
IDS = torch.arange(1, 17).view(2, 8)
PADDING = PACKED.document() < 0


def documents_of(batch, documents=None):
    local, sharded = shard_batch({"input_ids": IDS, **batch}, ONE_RANK, documents=documents)
    assert set(local) == {"input_ids", *(batch.keys() & DEFAULT_FIELDS.keys())}
    return sharded.documents


WAYS = {
    "document_ids": {"document_ids": PACKED.document()},
    "document_ids in any order": {
        "document_ids": torch.tensor([[7] * 3 + [2] * 5, [9] * 4 + [1] * 2 + [-1] * 2])
    },
    "seq_idx int32": {"seq_idx": PACKED.document().int()},
    "seq_lens": {"seq_lens": torch.tensor([[3, 5], [4, 2]])},
    "seq_lens with a sentinel": {"seq_lens": torch.tensor([[3, 5, -1000], [4, 2, -1000]])},
    "seq_lens with zeros, a list": {"seq_lens": [[3, 5, 0], [4, 2, 0]]},
    "cu_seqlens of each row": {"cu_seqlens": torch.tensor([[0, 3, 8], [0, 4, 6]])},
    "cu_seqlens of each row, filled up": {
        "cu_seqlens": torch.tensor([[0, 3, 8, 8, -1], [0, 4, 6, 6, 6]])
    },
    "cu_seqlens through all rows": {"cu_seqlens": torch.tensor([0, 3, 8, 12, 14])},
    "cu_seqlens int32 through all rows, filled up": {
        "cu_seqlens": torch.tensor([0, 3, 8, 12, 14, 14, 14], dtype=torch.int32)
    },
    "cu_seqlens over padding": {
        "cu_seqlens": torch.tensor([0, 3, 8, 12, 16]),
        "padding_mask": PADDING,
    },
    "flattening keys": {
        "cu_seq_lens_q": torch.tensor([0, 3, 8, 12, 14]),
        "cu_seq_lens_k": torch.tensor([0, 3, 8, 12, 14]),
        "max_length_q": 5,
        "max_length_k": torch.tensor(5),
    },
    "everything at once": {
        "seq_lens": torch.tensor([[3, 5], [4, 2]]),
        "document_ids": PACKED.document(),
        "cu_seqlens": torch.tensor([0, 3, 8, 12, 14]),
        "position_ids": PACKED.position_ids(),
        "padding_mask": PADDING,
        "max_seqlen": 5,
    },
    "restarting position_ids": {"position_ids": WHOLE.position_ids(), "padding_mask": PADDING},
    "None beside": {
        "seq_lens": [[3, 5], [4, 2]],
        "cu_seqlens": None,
        "padding_mask": None,
        "max_length_q": None,
    },
}


@pytest.mark.parametrize("way", WAYS, ids=lambda way: f"A11-{way}")
def test_every_usual_way_gives_the_documents(way):
    batch = WAYS[way]
    kept = {key: x for key, x in batch.items() if x is not None}
    local, sharded = shard_batch({"input_ids": IDS, **batch}, ONE_RANK)
    assert sharded.documents == PACKED
    assert set(local) == {"input_ids", *(kept.keys() & DEFAULT_FIELDS.keys())}
    assert documents_of(kept, PACKED) == PACKED


@pytest.mark.parametrize(
    ("batch", "match"),
    [
        (
            {"document_ids": [[0] * 3 + [1] * 5, [0, 0, 1, 1, 0, 0, 0, 0]]},
            r"document_ids\[1, 4\]=0",
        ),
        ({"document_ids": [[-1] + [0] * 7, [0] * 8]}, r"document_ids\[0, 0\]=-1 before tokens"),
        ({"document_ids": torch.zeros(8)}, r"document_ids.shape=\(8,\) for 2 rows of 8"),
        ({"seq_idx": torch.zeros(2, 8)}, r"seq_idx \[B, S\], got seq_idx.dtype=torch.float32"),
        ({"seq_lens": [[3, 6], [4, 4]]}, "got 9 tokens in row 0"),
        ({"seq_lens": [3, 5]}, r"seq_lens \[B, documents\], got seq_lens.shape=\(2,\)"),
        ({"seq_lens": [[3.0, 5.0], [4.0, 4.0]]}, "seq_lens.dtype=torch.float32"),
        ({"seq_lens": [[3, 5], [4]]}, "lists of equal lengths, got seq_lens of type list"),
        ({"cu_seqlens": [0, 3, 12, 16]}, "tokens 3 to 11, from row 0, token 3"),
        ({"cu_seqlens": [1, 5, 9]}, r"ascend from 0 to the 16.*cu_seqlens=\[1, 5, 9\]"),
        ({"cu_seqlens": [0, 5, 3, 8]}, "ascend from 0"),
        ({"cu_seqlens": [0, 8, 17]}, "ascend from 0 to the 16 tokens.*up to 17"),
        ({"cu_seqlens": [[0, 8], [0, 9]]}, "the 8 tokens they lie in.*in row 1, up to 9"),
        ({"cu_seqlens": [[0, 8]]}, r"cu_seqlens.shape=\(1, 2\) for 2 rows"),
        ({"cu_seqlens": [0.0, 8.0]}, "cu_seqlens.dtype=torch.float32"),
        ({"cu_seqlens": "08"}, "cu_seqlens of type str"),
        ({"max_length_q": 4, "seq_lens": [[8], [4]]}, "max_length_q=4 with a document of 8"),
        ({"max_length_q": torch.zeros(0, dtype=torch.int64)}, "max_length_q is a number, got"),
    ],
    ids=lambda value: f"A11-{next(iter(value))}" if isinstance(value, dict) else "",
)
def test_what_describes_no_documents_of_these_rows_is_refused(batch, match):
    with pytest.raises((ValueError, TypeError), match=match):
        documents_of(batch)


SHIFTED = Documents(((4, 4), (4, 4)), 8)


@pytest.mark.parametrize(
    ("documents", "batch", "match"),
    [
        (SHIFTED, {"position_ids": WHOLE.position_ids()}, "0 at token 3 of row 0, inside a"),
        (Documents.single(2, 8), {"position_ids": WHOLE.position_ids()}, "token 3 of row 0"),
        (
            Documents(((3, 5), (4, 2, 2)), 8),
            {"position_ids": WHOLE.position_ids()},
            "1 and then 2 at token 6 of row 1, where one starts by documents",
        ),
        (
            SHIFTED,
            {"position_ids": WHOLE.position_ids().expand(3, 2, 8)},
            "0 at token 3 of row 0",
        ),
        (
            None,
            {"position_ids": WHOLE.position_ids(), "cu_seqlens": [0, 4, 8, 12, 16]},
            "0 at token 3 of row 0, inside a document by cu_seqlens",
        ),
        (SHIFTED, {"seq_lens": [[3, 5], [4, 4]]}, "token 3 of row 0 in document 0 by documents"),
        (
            None,
            {"seq_lens": [[3, 5], [4, 4]], "document_ids": [[0] * 3 + [1] * 5, [0] * 5 + [1] * 3]},
            "token 4 of row 1 in document 0 by document_ids and in document 1 by seq_lens",
        ),
        (
            None,
            {"cu_seq_lens_q": [0, 8, 16], "cu_seq_lens_k": [0, 8, 12, 16]},
            "token 4 of row 1 in document 0 by cu_seq_lens_q and in document 1 by cu_seq_lens_k",
        ),
        (PACKED, {"seq_lens": [[3, 5], [4, 4]]}, "token 6 of row 1 in no document by documents"),
        (WHOLE, {"padding_mask": WHOLE.position_ids() == 2}, r"padding_mask\[0, 5\]=True"),
        (
            WHOLE,
            {"padding_mask": PADDING.float() * -1e9},
            r"padding_mask\[1, 6\]=-1e\+?09|\[1, 6\]",
        ),
        (WHOLE, {"padding_mask": PADDING[:1]}, "rows of one length.*.padding_mask.: 1"),
        (PACKED, {"labels": IDS}, r"labels\[1, 6\]=15 at a token of padding"),
        (None, {"labels": IDS, "padding_mask": PADDING}, r"labels\[1, 6\]=15"),
    ],
    ids=lambda value: f"A5-{'-'.join(value)}" if isinstance(value, dict) else "",
)
def test_contradictions_are_refused_by_row_and_token(documents, batch, match):
    with pytest.raises(ValueError, match=match):
        documents_of(batch, documents)


@pytest.mark.parametrize(
    "position_ids",
    [
        WHOLE.position_ids(),
        torch.arange(8)[None],
        torch.arange(8).expand(3, 2, 8),
        WHOLE.position_ids() + 2,
        torch.tensor([[40, 41, 42, 0, 1, 2, 3, 4], [0, 1, 2, 3, 0, 1, 2, 3]]),
    ],
    ids=lambda value: f"A5-{tuple(value.shape)}-from-{int(value.flatten()[0])}",
)
def test_position_ids_that_agree_are_left_as_they_are(position_ids):
    """Those that count through, start at another number or go on from an earlier row."""
    batch = {"input_ids": IDS, "position_ids": position_ids}
    local, sharded = shard_batch(batch, ONE_RANK, documents=WHOLE)
    assert torch.equal(local["position_ids"], position_ids)
    assert sharded.documents == WHOLE


def test_labels_that_a_loss_mask_leaves_out_may_stand_in_padding_A5():
    batch = {"labels": IDS + 1, "loss_mask": (~PADDING).long(), "padding_mask": PADDING}
    assert documents_of(batch) == Documents(((8,), (6,)), 8)


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int64, torch.float32, torch.bfloat16]
)
def test_padding_masks_of_any_dtype_are_read_alike_B3(dtype):
    expected = Documents(((8,), (6,)), 8)
    local, sharded = shard_batch({"input_ids": IDS, "padding_mask": PADDING.to(dtype)}, ONE_RANK)
    assert sharded.documents == expected
    assert torch.equal(local["padding_mask"], PADDING)
    batch = {"input_ids": IDS, "attention_mask": (~PADDING).to(dtype), "labels": IDS}
    assert documents_of_hf_batch(batch) == expected
    local, _ = shard_hf_batch(batch, ONE_RANK, model=Placed())
    assert torch.equal(local["labels"], shift_labels(IDS, expected))


FEATURES = [{"input_ids": list(range(1, n + 1))} for n in (3, 5, 1, 5)]


@pytest.mark.parametrize("kwargs", [False, True], ids=["B3", "B3-flash"])
@pytest.mark.parametrize("seq_idx", [False, True], ids=["", "seq_idx"])
@pytest.mark.parametrize("positions", [False, True], ids=["", "position_ids"])
def test_what_a_flattening_collator_makes_is_cut_as_it_comes(kwargs, seq_idx, positions):
    collate = DataCollatorWithFlattening(
        return_flash_attn_kwargs=kwargs,
        return_seq_idx=seq_idx,
        return_position_ids=positions,
        return_tensors="pt",
    )
    batch = collate(FEATURES)
    documents = Documents(((3, 5, 1, 5),), 14)
    if not (kwargs or seq_idx or positions):
        documents = Documents.single(1, 14)
    local, sharded = shard_hf_batch(batch, ONE_RANK, model=Placed())
    assert sharded.documents == documents
    assert set(local) == {"input_ids", "labels", "position_ids"}
    assert torch.equal(local["position_ids"], documents.position_ids())
    labels = shift_labels(batch["labels"], documents)
    assert torch.equal(local["labels"], labels)
    if documents.lengths != ((14,),):
        ends = documents.ends()[0].unique()
        assert (labels[0, ends] == IGNORED).all()


def test_a_value_of_none_is_left_out_B3():
    batch = {"input_ids": IDS, "attention_mask": None, "position_ids": None, "labels": None}
    local, sharded = shard_hf_batch(batch, ONE_RANK, model=Placed())
    assert set(local) == {"input_ids", "position_ids"}
    assert sharded.documents == Documents.single(2, 8)


def test_attention_mask_that_numbers_documents_is_read_B3():
    numbers = PACKED.document() + 1
    batch = {"input_ids": IDS, "attention_mask": numbers}
    assert documents_of_hf_batch(batch) == PACKED
    batch["position_ids"] = WHOLE.position_ids()
    assert documents_of_hf_batch(batch) == PACKED


@pytest.mark.parametrize(
    ("batch", "match"),
    [
        ({"attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]])}, "shape"),
        (
            {"attention_mask": ~PADDING.flip(1)},
            "token 1 of row 1 with a token after it: pad on the",
        ),
        ({"attention_mask": (~PADDING)[:, None, None]}, r"got shape \(2, 1, 1, 8\)"),
        ({"attention_mask": PADDING * -1e9}, r"attention_mask\[1, 6\]"),
        ({"attention_mask": ~PADDING, "padding_mask": ~PADDING}, "that differ: pass one"),
        (
            {"attention_mask": PACKED.document() + 1, "position_ids": SHIFTED.position_ids()},
            r"0 at token 4 of row 0, inside a document by attention_mask",
        ),
        (
            {"position_ids": SHIFTED.position_ids(), "cu_seq_lens_q": [0, 3, 8, 12, 16]},
            "0 at token 4 of row 0, inside a document by cu_seq_lens_q",
        ),
        ({"position_ids": torch.arange(8)[None] + 2}, r"position_ids\[0, 0\]=2 at token 0 of"),
        (
            {"position_ids": torch.arange(8)[None], "cu_seq_lens_q": [0, 3, 8, 12, 16]},
            r"position_ids\[0, 3\]=3 at token 0 of document 1",
        ),
        ({"max_length_q": 7}, "max_length_q=7 with a document of 8 tokens from token 0 of row 0"),
    ],
    ids=lambda value: f"A5-B3-{'-'.join(value)}" if isinstance(value, dict) else "",
)
def test_a_batch_of_transformers_that_contradicts_itself_is_refused(batch, match):
    with pytest.raises(ValueError, match=match):
        shard_hf_batch({"input_ids": IDS, **batch}, ONE_RANK, model=Placed())


def test_packed_rows_without_a_batch_dim_are_held_to_their_slots_A5():
    slots = {
        "seq_lens": torch.tensor([[3, 3], [4, 2]]),
        "seq_lens_padded": torch.tensor([[4, 4]] * 2),
    }
    batch = {"input_ids": IDS, "labels": IDS, **slots}
    right = to_thd(batch)
    assert right["position_ids"].tolist() == [0, 1, 2, 3] * 4
    to_thd({**batch, "position_ids": right["position_ids"].view(2, 8)})
    other = Documents(((2, 6), (4, 4)), 8).position_ids()
    with pytest.raises(ValueError, match="0 at token 2 of row 0, inside a document by seq_lens"):
        to_thd({**batch, "position_ids": other})
    padding = right["padding_mask"].view(2, 8)
    to_thd({**batch, "padding_mask": padding})
    with pytest.raises(ValueError, match=r"padding_mask\[0, 0\]=True with token 0 of row 0 in"):
        to_thd({**batch, "padding_mask": ~padding})


@pytest.mark.parametrize(
    ("make", "key", "value"),
    [
        (make_dsv4_contiguous_shard_cp_batch_and_ctx, "seq_lens", torch.tensor([[3, 5], [4, 4]])),
        (make_dsv4_contiguous_shard_cp_batch_and_ctx, "_packed_seq_ids", WHOLE.document() + 1),
        (make_contiguous_shard_cp_batch_and_ctx, "_packed_seq_ids", WHOLE.document() + 1),
    ],
    ids=["A5-dsv4-seq_lens", "A5-dsv4-ids", "A5-gemma4-ids"],
)
def test_contiguous_batches_hold_position_ids_to_their_documents(make, key, value):
    batch = {"input_ids": IDS, "labels": IDS, key: value}
    make(None, None, {**batch, "position_ids": WHOLE.position_ids()})
    make(None, None, {**batch, "position_ids": torch.arange(8).expand(2, -1)})
    with pytest.raises(ValueError, match=f"0 at token 4 of row 0, inside a document by {key}"):
        make(None, None, {**batch, "position_ids": SHIFTED.position_ids()})
