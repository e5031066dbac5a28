"""Labels that are shifted once too often or not at all are refused where that shows."""

import pytest
import torch

from dtcp.batch import shard_batch
from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.huggingface import install_mixers, shard_hf_batch
from dtcp.labels import IGNORED, check_not_shifted, check_shifted, shift_labels
from dtcp.rows import DEFAULT_FIELDS, TokenField
from dtcp.sequence.documents import Documents
from dtcp.sequence.masks import Bidirectional, Causal, SlidingWindow
from dtcp.softmax.mixer import SoftmaxAttention
from tests.harness.hf_models import build

GENERATOR = torch.Generator().manual_seed(0)
IDS = torch.randint(1, 50, (2, 600), generator=GENERATOR)
DOCUMENTS = Documents(((600,), (200, 300)), 600)
SHIFTED = shift_labels(IDS, DOCUMENTS)
ANSWERS = torch.arange(600) > 500


def of_answers(labels):
    return labels.where(ANSWERS, -100)


@pytest.mark.parametrize("part", [lambda labels: labels, of_answers], ids=["all", "answers"])
def test_labels_are_refused_where_they_are_shifted_too_seldom_or_too_often(part):
    shifted, plain = part(SHIFTED), part(IDS)
    check_shifted({"input_ids": IDS, "labels": shifted})
    check_not_shifted({"input_ids": IDS, "labels": plain})
    with pytest.raises(ValueError, match=r"are shifted before .*: give shift_labels"):
        check_shifted({"input_ids": IDS, "labels": plain})
    with pytest.raises(ValueError, match=r"not shifted yet, .* as transformers has them"):
        check_not_shifted({"input_ids": IDS, "labels": shifted})


@pytest.mark.parametrize(
    "batch",
    [
        {"input_ids": torch.full((1, 64), 3), "labels": torch.full((1, 64), 3)},
        {"input_ids": IDS, "labels": IDS.flip(1)},
        {"input_ids": IDS.masked_fill(ANSWERS, 0), "labels": IDS},
        {"input_ids": IDS, "labels": torch.full_like(IDS, -100)},
        {"input_ids": IDS[:, :8], "labels": IDS[:, :8].where(torch.arange(8) > 4, -100)},
        {"input_ids": IDS[:1].T, "labels": IDS[:1].T},
        {"inputs_embeds": torch.zeros(1, 4, 8), "labels": IDS[:1, :4]},
        {"input_ids": IDS},
    ],
    ids=[
        "one token",
        "others",
        "denoised",
        "none",
        "few",
        "rows of one",
        "embeddings",
        "no labels",
    ],
)
def test_labels_that_do_not_tell_are_taken(batch):
    check_shifted(batch)
    check_not_shifted(batch)


def test_batches_of_such_labels_are_refused():
    alone = ParallelMesh(Degrees(), None, *[None] * 7)
    with pytest.raises(ValueError, match="give shift_labels"):
        shard_batch({"input_ids": IDS, "labels": IDS}, alone)
    local, _ = shard_batch({"input_ids": IDS, "labels": SHIFTED}, alone, documents=DOCUMENTS)
    assert torch.equal(local["labels"], SHIFTED)
    model = build("llama", vocab_size=64)
    install_mixers(model)
    with pytest.raises(ValueError, match="as transformers has them"):
        shard_hf_batch({"input_ids": IDS, "labels": SHIFTED}, alone, model=model)
    local, _ = shard_hf_batch({"input_ids": IDS, "labels": IDS}, alone, model=model)
    assert torch.equal(local["labels"], shift_labels(IDS, Documents.single(2, 600)))


@pytest.mark.parametrize(
    ("mask", "taken"),
    [
        (Bidirectional(), True),
        (SlidingWindow(4, right=3), True),
        (Causal() & SlidingWindow(4), False),
        (SlidingWindow(4, right=0), False),
    ],
)
def test_a_token_may_be_its_own_target_where_a_model_attends_to_both_sides(mask, taken):
    alone = ParallelMesh(Degrees(), None, *[None] * 7)
    model, batch = SoftmaxAttention(mask), {"input_ids": IDS, "labels": IDS}
    if not taken:
        with pytest.raises(ValueError, match="where that is meant, give them under another key"):
            shard_batch(batch, alone, model=model)
    fields = DEFAULT_FIELDS if taken else DEFAULT_FIELDS | {"targets": TokenField(1, IGNORED)}
    key = "labels" if taken else "targets"
    local, _ = shard_batch({"input_ids": IDS, key: IDS}, alone, model=model, fields=fields)
    assert torch.equal(local[key], IDS)
