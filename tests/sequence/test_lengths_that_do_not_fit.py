"""Documents longer than their row, and empty ones, by every way in which a batch may tell them."""

from itertools import accumulate

import pytest
import torch

from dtcp.batch import prepare_batch, shard_batch
from dtcp.cp_utils.deepseek_v4_batch import make_dsv4_contiguous_shard_cp_batch_and_ctx
from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.huggingface.documents import documents_of_hf_batch
from dtcp.sequence.document_balanced import DocumentBalanced
from dtcp.sequence.documents import Documents
from dtcp.sequence.per_document import PerDocument
from dtcp.thd import to_thd

ROW = 8
IDS = torch.arange(ROW)[None]
MESH = ParallelMesh(Degrees(), None, *[None] * 7)


def bounds(lengths):
    return torch.tensor([*accumulate(lengths, initial=0)])


def numbers(lengths):
    return torch.repeat_interleave(torch.tensor(lengths))[None]


def of_shard_batch(**named):
    batch = {"input_ids": IDS, **named}
    return shard_batch(batch, MESH, DocumentBalanced)[1].documents


def of_prepared(**named):
    batch = {"input_ids": IDS, **named}
    return prepare_batch(batch, MESH, DocumentBalanced).sharded.documents


def of_transformers(**named):
    return documents_of_hf_batch({"input_ids": IDS, **named})


def of_thd(lengths):
    lens = {"seq_lens": torch.tensor([lengths]), "seq_lens_padded": torch.tensor([lengths])}
    return to_thd({"input_ids": IDS, "labels": IDS, **lens})


def of_deepseek_v4(lengths):
    batch = {"input_ids": IDS, "labels": IDS, "seq_lens": torch.tensor([lengths])}
    return make_dsv4_contiguous_shard_cp_batch_and_ctx(None, None, batch)


TOO_LONG = {
    "lengths": lambda x: Documents((tuple(x),), ROW),
    "boundaries": lambda x: Documents.from_cu_seqlens(bounds(x), ROW),
    "shard_batch seq_lens": lambda x: of_shard_batch(seq_lens=torch.tensor([x])),
    "shard_batch cu_seqlens": lambda x: of_shard_batch(cu_seqlens=bounds(x)),
    "shard_batch document_ids": lambda x: of_shard_batch(document_ids=numbers(x)),
    "prepare_batch cu_seqlens": lambda x: of_prepared(cu_seq_lens_q=bounds(x)[None]),
    "transformers cu_seq_lens_q": lambda x: of_transformers(cu_seq_lens_q=bounds(x)),
    "transformers seq_idx": lambda x: of_transformers(seq_idx=numbers(x)),
    "thd": of_thd,
    "published DeepSeek-V4": of_deepseek_v4,
    "PerDocument": lambda x: PerDocument(ROW, 2, tuple(x)),
}


@pytest.mark.parametrize("entry", TOO_LONG)
def test_documents_longer_than_their_row_are_refused_in_one_sentence(entry):
    with pytest.raises(ValueError, match="got ") as refused:
        TOO_LONG[entry]([5, 4])
    said = str(refused.value)
    assert ": " in said and said.endswith(".") and said.count(". ") == 0


def test_documents_shorter_than_their_row_leave_padding_which_has_no_loss():
    """A batch whose lengths miss tokens is refused where those have labels."""
    named = {"seq_lens": torch.tensor([[3, 4]])}
    assert of_shard_batch(**named).lengths == ((3, 4),)
    with pytest.raises(ValueError, match=r"Padding has no loss, got labels\[0, 7\]=7"):
        of_shard_batch(**named, labels=IDS)


@pytest.mark.parametrize("entry", ["lengths", "boundaries", "PerDocument"])
def test_documents_without_a_token_are_refused_where_lengths_are_given_one_by_one(entry):
    with pytest.raises(ValueError, match=r"one token|empty ones"):
        TOO_LONG[entry]([3, 0, 5])


@pytest.mark.parametrize("entry", [name for name in TOO_LONG if name.startswith(("shard", "prep"))])
def test_lengths_of_zero_that_fill_up_a_key_are_no_documents(entry):
    """Collators fill up rows with fewer documents than others; a zero between two is one, too."""
    assert TOO_LONG[entry]([3, 0, 5]).lengths == TOO_LONG[entry]([3, 5, 0]).lengths == ((3, 5),)
