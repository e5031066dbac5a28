"""All that a batch may say of its documents, on random arguments: one reading, or a refusal.

What is drawn is documents; every key that can tell them is made from them, and some are spoiled.
"""

from itertools import accumulate

import pytest
import torch

from dtcp.batch import shard_batch
from dtcp.huggingface.batch import shard_hf_batch
from dtcp.labels import IGNORED, shift_labels
from dtcp.sequence.batch_documents import (
    documents_of_batch,
    documents_of_boundaries,
    documents_of_ids,
    documents_of_lengths,
    read_padding_mask,
)
from dtcp.sequence.block_balanced import BlockBalanced
from dtcp.sequence.buckets import Buckets, MultiplesOf, OneOf, PowersOfTwo
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import Contiguous, HeadTail
from dtcp.sequence.per_document import PerDocument
from tests.entry_points.test_fuzz_batches import OneOfMany, of_rows, picked
from tests.entry_points.test_fuzz_planning import tokens_of
from tests.harness.fuzz import run_cases
from tests.harness.hf_models import Placed

CASES = 160
MANY = 5_000


def numbered(documents):
    """A number at each token, other ones than 0, 1, ..; -1 for padding."""
    ids = documents.document()
    return torch.where(ids < 0, ids, 7 * ids + 3)


def boundaries_of_rows(documents):
    """[B, N + 1], filled up by -1."""
    bounds = [list(accumulate(row, initial=0)) for row in documents.lengths]
    longest = max(map(len, bounds))
    return torch.tensor([row + [-1] * (longest - len(row)) for row in bounds])


def lengths_of_rows(documents, fill=0):
    longest = max(1, *map(len, documents.lengths))
    return torch.tensor([[*row, *[fill] * (longest - len(row))] for row in documents.lengths])


def boundaries_through_all_rows(documents):
    """[N + 1]; None where a row ends in padding, which boundaries of all rows cannot tell."""
    if any(sum(row) < documents.seq_len for row in documents.lengths[:-1]):
        return None
    return torch.tensor(list(accumulate((x for r in documents.lengths for x in r), initial=0)))


def other_documents(documents):
    """Documents of the same rows that differ, if there are any."""
    rows, seq_len = documents.lengths, documents.seq_len
    found = []
    for row, lengths in enumerate(rows):
        for index, length in enumerate(lengths):
            if length > 1:
                cut = (*lengths[:index], 1, length - 1, *lengths[index + 1 :])
                found.append(Documents((*rows[:row], cut, *rows[row + 1 :]), seq_len))
                break
    return found


def keys_of(draw, documents):
    """Each key that tells these documents."""
    through = boundaries_through_all_rows(documents)
    keys = {
        "document_ids": numbered(documents),
        "seq_idx": documents.document().int(),
        "seq_lens": lengths_of_rows(documents, draw.choice((0, -1000))),
        "cu_seqlens": boundaries_of_rows(documents),
        "cu_seq_lens_q": through,
        "cu_seq_lens_k": through if through is None else through.int(),
    }
    return {key: x for key, x in keys.items() if x is not None}


def some_documents(draw):
    rows, seq_len = draw.integer(1, 3), draw.integer(2, 16)
    return Documents(draw.rows(rows, seq_len), seq_len)


def document_keys(draw, documents):
    """Some of the keys, sound or not."""
    keys = keys_of(draw, documents)
    chosen = [key for key in keys if draw.chance(0.4)] or [draw.choice(sorted(keys))]
    batch = {}
    for key in chosen:
        x = keys[key]
        others = [x.double(), x.bool(), x[..., None, None], "x", 3]
        if key in ("document_ids", "seq_idx"):
            others += [x[:, 1:], x[0], torch.cat((x, x))]
        if key == "seq_lens":
            others += [torch.cat((x, x)), x[0], x.abs() + documents.seq_len + 1]
        if key.startswith("cu"):
            others += [x + 1, x + documents.seq_len * 9]
        batch[key] = draw.bad(key, x, *others)
    given = [x for x in batch.values() if isinstance(x, torch.Tensor)]
    if draw.chance(0.3) and given:
        named = {key: x.tolist() if isinstance(x, torch.Tensor) else x for key, x in batch.items()}
        batch = draw.choice((named, batch))
    others = other_documents(documents)
    if len(chosen) > 1 and others:
        key = chosen[-1]
        wrong = keys_of(draw, draw.choice(others)).get(key)
        if wrong is not None and not torch.equal(wrong, keys[key]):
            batch[key] = draw.bad("contradiction", batch[key], wrong)
    if draw.chance(0.3):
        longest = max(max(row, default=0) for row in documents.lengths)
        wrong = [longest - 1] if longest else []
        batch["max_length_q"] = draw.bad("max_length_q", longest, *wrong, "x", [[]])
    return batch


def documents_that_keys_tell(draw):
    documents = some_documents(draw)
    batch = document_keys(draw, documents)
    rows, seq_len = documents.batch, documents.seq_len
    if draw.chance(0.4):
        position_ids = documents.position_ids()
        wrong = [position_ids[:, 1:], position_ids[None, None], "x"]
        inside = position_ids.clone()
        for row, lengths in enumerate(documents.lengths):
            if lengths and lengths[0] > 1:
                inside[row, 1 : lengths[0]] -= 1
                inside[row, 1] = 0
                wrong.append(inside)
                break
        batch["position_ids"] = draw.bad("position_ids", position_ids, *wrong)
    if draw.chance(0.4):
        padding = documents.document() < 0
        wrong = [padding[:, 1:], padding[0], padding.int() * 2 - 1, 3]
        marks = draw.choice((padding, padding.int(), padding.float(), padding.tolist()))
        batch["padding_mask"] = draw.bad("padding_mask", marks, *wrong)
    assert documents_of_batch(batch, rows, seq_len) == documents


def batches_cut_by_their_keys(draw):
    ranks = draw.integer(1, 3)
    mesh = OneOfMany(ranks, draw.integer(0, ranks - 1))
    documents = some_documents(draw)
    rows, seq_len = documents.batch, documents.seq_len
    ids = draw.ids(rows, seq_len)
    batch = {"input_ids": ids, **document_keys(draw, documents)}
    labels = shift_labels(ids, documents)
    padding = documents.document() < 0
    if draw.chance():
        wrong = [labels.masked_fill(padding, 5)] if bool(padding.any()) else []
        batch["labels"] = draw.bad("labels", labels, *wrong, labels[:, 1:], None)
    local, sharded = shard_batch(batch, mesh, draw.choice((Contiguous, HeadTail)))
    mine = tokens_of(sharded.layout)[mesh.mine]
    assert sharded.documents.lengths == documents.lengths
    assert torch.equal(local["input_ids"], picked(ids, mine, 1, 0))
    if "labels" in batch:
        assert torch.equal(local["labels"], picked(labels, mine, 1, IGNORED))


def batches_of_transformers(draw):
    ranks = draw.integer(1, 3)
    mesh = OneOfMany(ranks, draw.integer(0, ranks - 1))
    documents = some_documents(draw)
    ids, keys = draw.ids(documents.batch, documents.seq_len), document_keys(draw, documents)
    batch = {"input_ids": draw.bad("input_ids", ids, ids[0, 0], ids.tolist(), 3), **keys}
    numbers = documents.document() + 1
    if draw.chance():
        wrong = [numbers[:, 1:], -numbers - 1, numbers + 0.5, 3, [[0]]]
        marks = draw.choice((numbers, (numbers > 0).long(), (numbers > 0)))
        batch["attention_mask"] = draw.bad("attention_mask", marks, *wrong)
    if draw.chance():
        batch["labels"] = draw.bad("labels", ids, ids[:, 1:], ids.double(), 3, ids.tolist())
    layout = draw.choice((Contiguous, HeadTail))
    local, sharded = shard_hf_batch(batch, mesh, layout, model=Placed())
    mine = tokens_of(sharded.layout)[mesh.mine]
    assert sharded.documents.lengths == documents.lengths
    assert torch.equal(local["input_ids"], picked(ids, mine, 1, 0))
    if "labels" in batch:
        shifted = shift_labels(ids, documents)
        assert torch.equal(local["labels"], picked(shifted, mine, 1, IGNORED))


def keys_one_by_one(draw):
    """The readers themselves."""
    documents = some_documents(draw)
    rows, seq_len = documents.batch, documents.seq_len
    kind = draw.integer(0, 3)
    if kind == 0:
        ids = numbered(documents)
        early = ids.clone()
        early[:, 0] = -1
        wrong = [ids.double(), ids.bool(), ids[0], ids[None], None, ids.tolist()]
        wrong += [early] if any(len(x) > 1 or sum(x) > 1 for x in documents.lengths) else []
        given = draw.bad("document_ids", ids, *wrong)
        assert documents_of_ids(given) == documents
    elif kind == 1:
        lengths = lengths_of_rows(documents)
        wrong = [lengths[0], torch.cat((lengths, lengths)), lengths.double(), None, lengths + 99]
        given = draw.bad("seq_lens", lengths, *wrong, lengths.bool())
        assert documents_of_lengths(given, rows, seq_len) == documents
    elif kind == 2:
        bounds = boundaries_of_rows(documents)
        wrong = [bounds + 1, bounds.double(), bounds[None], None, bounds.tolist(), bounds.bool()]
        given = draw.bad("cu_seqlens", bounds, *wrong)
        assert documents_of_boundaries(given, rows, seq_len) == documents
    else:
        padding = of_rows(documents.lengths, seq_len, 0) < 0
        wrong = [padding[0], padding.int() + 2, padding.double() - 0.5, "x", 3]
        others = padding.int(), padding.double(), padding.tolist()
        given = draw.bad("padding_mask", draw.choice((padding, *others)), *wrong)
        assert torch.equal(read_padding_mask(given, rows, seq_len), padding)


def a_rule(draw):
    """A rule, what it rounds to, and the most that it takes."""
    kind = draw.integer(0, 2)
    if kind == 0:
        least = 2 ** draw.integer(0, 3)
        most = draw.choice((None, least + draw.integer(0, 30)))
        wrong = [3, 0, -1, 1.5, None]
        rule = PowersOfTwo(draw.bad("least", least, *wrong), draw.bad("most", most, -1, 0.5, "1"))
        sizes = [least * 2**power for power in range(8)]
    elif kind == 1:
        step = draw.integer(1, 7)
        most = draw.choice((None, step + draw.integer(0, 30)))
        rule = MultiplesOf(draw.bad("step", step, 0, -1, 1.5, None), most)
        sizes = [step * count for count in range(1, 60)]
    else:
        sizes = sorted({draw.integer(1, 40) for _ in range(draw.integer(1, 4))})
        most = sizes[-1]
        wrong = [(), (0, *sizes), (*sizes, sizes[-1]), list(sizes), (1.5,), None, 4]
        rule = OneOf(draw.bad("sizes", tuple(sizes), *wrong))
    if most is not None:
        sizes = [x for x in sizes if x < most] + [most]
    return rule, sizes, most


def batches_in_buckets(draw):
    ranks = draw.integer(1, 3)
    mesh = OneOfMany(ranks, draw.integer(0, ranks - 1))
    kind = draw.choice((Contiguous, HeadTail, PerDocument, BlockBalanced))
    alike = kind in (PerDocument, BlockBalanced)
    rows, seq_len = draw.integer(1, 3), draw.integer(2, 16)
    documents = Documents(draw.rows(rows, seq_len, alike=alike), seq_len)
    tokens, sizes, most = a_rule(draw)
    several = draw.choice((None, OneOf((3, 5)), MultiplesOf(2)))
    buckets = Buckets(tokens, rows=draw.bad("rows", several, 3, OneOf, "1"))
    if most is not None and seq_len > most:
        draw.unsound.append("a row longer than any bucket")
        draw.is_bad = True
    ids = draw.ids(rows, seq_len)
    batch = {"input_ids": ids, "position_ids": documents.position_ids()}
    batch["labels"] = shift_labels(ids, documents)
    batch["mm_token_type_ids"] = torch.zeros_like(ids)
    given = draw.bad("buckets", buckets, 256, Buckets, tokens)
    local, sharded = shard_batch(batch, mesh, kind, documents=documents, buckets=given)
    more = {None: rows, 3: 3 if rows <= 3 else 5, 2: -(-rows // 2) * 2}
    count = more[None if several is None else (3 if isinstance(several, OneOf) else 2)]
    length = min(x for x in sizes if x >= seq_len)
    length = -(-length // kind.multiple(ranks)) * kind.multiple(ranks)
    assert (sharded.documents.batch, sharded.layout.seq_len) == (count, length)
    assert sharded.padding_fraction == 1 - rows * seq_len / (count * length)
    mine = tokens_of(sharded.layout)[mesh.mine]
    for key, pad in (("input_ids", 0), ("labels", IGNORED), ("mm_token_type_ids", 0)):
        expected = picked(batch[key], mine, 1, pad)
        assert torch.equal(local[key][:rows], expected)
        assert bool((local[key][rows:] == pad).all())
    assert sharded.documents.lengths == (*documents.lengths, *[()] * (count - rows))
    x = draw.floats(rows, seq_len, 2)
    assert torch.equal(sharded.shard(x)[:rows], picked(x, mine, 1, 0))


SUBJECTS = (
    batches_in_buckets,
    documents_that_keys_tell,
    batches_cut_by_their_keys,
    batches_of_transformers,
    keys_one_by_one,
)


@pytest.mark.parametrize(
    "cases", [range(CASES), pytest.param(range(CASES, MANY), marks=pytest.mark.slow)], ids=len
)
def test_fuzzed_ways_of_telling_documents_are_read_alike_or_refused(cases, capsys):
    tally = run_cases(SUBJECTS, cases)
    with capsys.disabled():
        tally.check()
