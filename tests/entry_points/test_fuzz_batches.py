"""What is done with batches in one process, on random arguments: sharding, THD, losses, mixers.

A batch is sharded for a rank of several without the others: nothing is communicated. The truth is
the dense reference, or a loop over tokens.
"""

from itertools import accumulate

import pytest
import torch
from torch.nn import functional as F

from dtcp.batch import shard_batch
from dtcp.cp_utils import (
    _build_position_ids,
    build_dsv4_cp_causal_padding_mask,
    make_cp_batch_and_ctx,
    make_cp_batch_for_te,
    make_dsv4_contiguous_shard_cp_batch_and_ctx,
    make_target_cp_ctx,
)
from dtcp.cp_utils.masks import documents_of_mask
from dtcp.cp_utils.validation import check_rows, padding_of_mask
from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.huggingface.documents import documents_of_hf_batch
from dtcp.labels import IGNORED
from dtcp.loss import global_token_count, mtp_loss, token_mean_loss
from dtcp.mixer_metadata import batch_metadata
from dtcp.recurrent import CausalConv1d, GatedDeltaRule
from dtcp.sequence.block_balanced import BlockBalanced
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import Contiguous, HeadTail
from dtcp.sequence.masks import Causal
from dtcp.sequence.per_document import PerDocument
from dtcp.softmax import HaloAttention, HybridAttention, RingAttention
from dtcp.softmax.mixer import SoftmaxAttention
from dtcp.sparse.mixer import CompressedSparseAttention, Compression
from dtcp.thd import partition_indices, row_chunks, thd_layout, to_thd
from dtcp.thd_attention import PackedAttention
from tests.entry_points.test_fuzz_planning import (
    a_mask,
    block_of,
    prefix_of,
    spelled_out,
    the_rule,
    tokens_of,
)
from tests.harness import reference
from tests.harness.fuzz import run_cases

CASES = 480
MANY = 12_000


class OneOfMany(ParallelMesh):
    """A rank of an axis whose other ranks are not there."""

    def __init__(self, ranks, mine):
        super().__init__(Degrees(cp=ranks), None, *[None] * 7)
        object.__setattr__(self, "mine", mine)

    def size(self, name):
        return self.degrees.cp

    def rank(self, name):
        return self.mine


def of_rows(lengths, seq_len, field):
    """One number of every token: its document (0), its position id (1)."""
    return torch.tensor([[x[field] for x in spelled_out(row, seq_len)] for row in lengths])


def picked(x, tokens, dim, pad):
    """The tokens of these indices; those beyond the end hold `pad`."""
    last = x.shape[dim]
    parts = [
        x.select(dim, t) if t < last else torch.full_like(x.select(dim, 0), pad) for t in tokens
    ]
    return torch.stack(parts, dim=dim)


def sharded_batches(draw):
    ranks = draw.integer(1, 3)
    mesh = OneOfMany(ranks, draw.integer(0, ranks - 1))
    kind = draw.choice((Contiguous, HeadTail, PerDocument, BlockBalanced))
    rows, seq_len = draw.integer(1, 2), draw.integer(1, 20)
    alike = kind in (PerDocument, BlockBalanced)
    documents = Documents(draw.rows(rows, seq_len, alike=alike), seq_len)
    ids, embeds = draw.ids(rows, seq_len), draw.floats(rows, seq_len, 3)
    wrong = [ids[0, 0], ids[:, :0], None, ids.tolist(), ids[:0]]
    batch = {"input_ids": draw.bad("input_ids", ids, *wrong)}
    pads = {"input_ids": 0, "labels": IGNORED, "inputs_embeds": 0.0, "loss_mask": 0}
    padding = of_rows(documents.lengths, seq_len, 0) < 0
    labels, scored = (ids + 1).masked_fill(padding, IGNORED), (ids > 9) | padding
    whole = {"input_ids": ids, "labels": labels, "inputs_embeds": embeds, "loss_mask": scored}
    for key in ("labels", "inputs_embeds", "loss_mask"):
        if draw.chance(0.4):
            x = whole[key]
            wrong = [torch.cat((x, x), 1), torch.cat((x, x)), x[0, 0], None, "x"]
            if key == "labels" and bool(padding.any()):
                wrong.append(ids)
            batch[key] = draw.bad(key, x, *wrong)
    extra = draw.bad("further key", None, "weights", "attention_mask", 3)
    batch |= {} if extra is None else {extra: ids}
    if draw.chance(0.3):
        prefix = prefix_of(draw, documents)
        wrong = [prefix[:, :-1], prefix[0], prefix.double(), None, [1]]
        batch["prefix"] = draw.bad("prefix", prefix, *wrong)
    wrong = [Documents.single(rows + 1, seq_len), documents.padded(seq_len + 1), "one", 3]
    arguments = {"documents": draw.bad("documents", documents, *wrong)}
    by = draw.bad("layout", kind, kind(kind.multiple(ranks), ranks) if not alike else None, None)
    local, sharded = shard_batch(batch, mesh, by, **arguments)
    layout = sharded.layout
    assert layout.seq_len == -(-seq_len // kind.multiple(ranks)) * kind.multiple(ranks)
    mine = tokens_of(layout)[mesh.mine]
    for key in batch.keys() - {"prefix"}:
        assert torch.equal(local[key], picked(whole[key], mine, 1, pads[key]))
    assert sharded.documents.lengths == documents.lengths
    assert ("padding_mask" in local) == (layout.seq_len > seq_len)
    if "padding_mask" in local:
        assert torch.equal(local["padding_mask"], picked(padding, mine, 1, True))
    dim = draw.choice((1, -2))
    at = draw.bad("dim", dim, 3, -4, 1.0, None)
    given = draw.bad("x", embeds, embeds[:, 1:], ids[0], None)
    assert torch.equal(sharded.shard(given, dim=at), picked(embeds, mine, 1, 0))


def batches_that_tell_their_documents(draw):
    ranks = draw.integer(1, 3)
    mesh = OneOfMany(ranks, draw.integer(0, ranks - 1))
    rows, seq_len = draw.integer(1, 2), draw.integer(2, 16)
    lengths = draw.rows(rows, seq_len)
    padding, position_ids = of_rows(lengths, seq_len, 0) < 0, of_rows(lengths, seq_len, 1)
    ids = draw.ids(rows, seq_len)
    wrong = [position_ids[:, 1:], position_ids[0], position_ids.double() + 0.5, None, "0"]
    positions = draw.bad("position_ids", position_ids, *wrong)
    wrong = [padding[:, 1:], padding[0], torch.cat((padding, padding)), 1]
    marks = draw.bad("padding_mask", padding, *wrong)
    batch = {"input_ids": ids, "position_ids": positions, "padding_mask": marks}
    local, sharded = shard_batch(batch, mesh, draw.choice((Contiguous, HeadTail)))
    if bool(((position_ids.diff(dim=1) < 1) & ~padding[:, 1:]).any()):
        assert sharded.documents.lengths == lengths
    else:
        assert sharded.documents.lengths == tuple((sum(x),) if x else () for x in lengths)
    mine = tokens_of(sharded.layout)[mesh.mine]
    last = position_ids[:, -1:]
    on = torch.cat((position_ids, last + torch.arange(1, sharded.layout.seq_len + 1)), dim=1)
    assert torch.equal(local["position_ids"], on[:, mine])
    assert torch.equal(local["padding_mask"], picked(padding, mine, 1, True))


def thd_of(draw, ranks=1):
    """Packed rows for THD, and what each row's slots are."""
    rows = draw.integer(1, 3)
    multiple = 2 * ranks
    seq_len = draw.integer(1, 4) * multiple
    slots = []
    for _ in range(rows):
        row, room = [], seq_len
        while room and (not row or draw.chance(0.8)):
            slot = draw.integer(1, room // multiple) * multiple
            row.append((draw.integer(0 if len(row) else 1, slot), slot))
            room -= slot
        slots.append(row)
    longest = max(map(len, slots)) + draw.integer(0, 1)
    lengths, padded = (
        torch.tensor([[x[i] for x in row] + [-1000] * (longest - len(row)) for row in slots])
        for i in (0, 1)
    )
    ids = draw.ids(rows, seq_len)
    batch = {"input_ids": ids, "labels": ids + 1, "seq_lens": lengths, "seq_lens_padded": padded}
    if draw.chance(0.3):
        batch["weights"] = draw.floats(rows, seq_len, 2)
    for row in slots:
        rest = seq_len - sum(slot for _, slot in row)
        row[-1] = (row[-1][0], row[-1][1] + rest)
    return batch, [x for row in slots for x in row]


def spoiled_thd(draw, batch, *, values=True):
    """The batch with, maybe, a key that is not what it should be."""
    batch = dict(batch)
    for key in list(batch):
        x = batch[key]
        others = [None, x[0], x[:, :0] if key == "labels" else x[0], 3, x.tolist()]
        if key == "weights":
            continue
        if key.startswith("seq_lens"):
            others += [x.double(), torch.cat((x, x)), x.bool()]
            others += [x + 10_000, -x - 1] if values else []
        batch[key] = draw.bad(key, x, *others)
    for key in draw.bad("missing", (), *[(key,) for key in batch if key != "weights"]):
        del batch[key]
    return batch


def rows_to_thd(draw):
    batch, slots = thd_of(draw)
    given = spoiled_thd(draw, batch)
    if draw.chance(0.3):
        out = make_cp_batch_for_te(None, given, draw.bad("qkv_format", "thd", "bshd", None))
    else:
        out = to_thd(draw.bad("batch", given, None, [1]))
    assert torch.equal(out["input_ids"], batch["input_ids"].flatten())
    assert torch.equal(out["labels"], batch["labels"].flatten())
    if "weights" in batch:
        assert torch.equal(out["weights"], batch["weights"].flatten(0, 1))
    assert out["cu_seqlens"].tolist() == list(accumulate((a for a, _ in slots), initial=0))
    assert out["cu_seqlens_padded"].tolist() == list(accumulate((b for _, b in slots), initial=0))
    assert int(out["max_seqlen"]) == max(b for _, b in slots)
    assert out["position_ids"].tolist() == [i for _, b in slots for i in range(b)]
    assert out["padding_mask"].tolist() == [i >= a for a, b in slots for i in range(b)]


def chunks_of_rows(draw):
    batch, _ = thd_of(draw)
    rows = len(batch["input_ids"])
    number = draw.integer(1, rows)
    count = draw.bad("num_chunks", number, 0, rows + 1, -1, 1.5, None)
    chunks = row_chunks(spoiled_thd(draw, batch, values=False), count)
    per_chunk = -(-rows // number)
    assert [len(chunk["input_ids"]) for chunk in chunks] == [per_chunk] * number
    for key, x in batch.items():
        assert torch.equal(torch.cat([chunk[key] for chunk in chunks])[:rows], x)


def partitions_of_thd(draw):
    ranks = draw.integer(1, 3)
    _, slots = thd_of(draw, ranks)
    bounds = torch.tensor(list(accumulate((b for _, b in slots), initial=0)))
    total = int(bounds[-1])
    odd = torch.cat((bounds[:-1], bounds[-1:] + 1))
    wrong = [odd, bounds + 1, bounds.flip(0), bounds[None], bounds.double(), bounds.bool(), None]
    given = draw.bad("cu_seqlens_padded", bounds, *wrong)
    size = draw.bad("total", total, total + 2 * ranks, 0, float(total), None)
    count = draw.bad("num_shards", ranks, 0, -1, 1.5, None)
    rank = draw.integer(0, ranks - 1)
    mine = draw.bad("rank", rank, ranks, -1, 0.5, None)
    indices = partition_indices(given, size, count, mine).tolist()
    expected, start = [], 0
    for _, slot in slots:
        part = slot // (2 * ranks)
        head, tail = start + rank * part, start + (2 * ranks - 1 - rank) * part
        expected += [*range(head, head + part), *range(tail, tail + part)]
        start += slot
    assert indices == expected
    bounds = bounds.tolist()
    bounds = draw.bad("cu_seqlens_padded", bounds, None, 3, [0, 1.5], [-1, *bounds[1:]])
    assert thd_layout(bounds, size, count).token_indices(rank).tolist() == expected


def attention_on_thd(draw):
    batch, slots = thd_of(draw)
    flat = to_thd(batch)
    bounds = flat["cu_seqlens"]
    wrong = [bounds + 1, bounds.flip(0), bounds.double(), bounds[None], None]
    wrong = [x for x in wrong if x is None or not torch.equal(x, bounds)]
    given = {**flat, "cu_seqlens": draw.bad("cu_seqlens", bounds, *wrong)}
    attention = PackedAttention.of(given)
    total = len(flat["labels"])
    heads = draw.integer(1, 2)
    q, k, v = (draw.floats(total, n, 4) for n in (heads * draw.integer(1, 2), heads, heads))
    wrong = [k[:-1], k[:, :0], k[None], k.float(), k[..., :3], None]
    out = attention(q, draw.bad("k", k, *wrong), draw.bad("v", v, v[:-1], v[0], None))
    lengths = tuple(x for a, b in slots for x in (a, b - a) if x)
    seen = reference.visible((lengths,), total, reference.causal)
    real = torch.tensor([i < a for a, b in slots for i in range(b)])
    expected, _ = reference.attention(q[None], k[None], v[None], seen & real[None, :, None])
    torch.testing.assert_close(out, expected[0])


def masks_of_batches(draw):
    rows, seq_len = draw.integer(1, 2), draw.integer(1, 9)
    lengths = draw.rows(rows, seq_len)
    padding, position_ids = of_rows(lengths, seq_len, 0) < 0, of_rows(lengths, seq_len, 1)
    if draw.chance():
        mask, expected = (~padding).long(), tuple((sum(x),) if x else () for x in lengths)
        restarting = None
        others = [mask + 2, mask[0], mask[:, :0], mask.double() - 0.5, None, [1]]
        others += [mask * 2 - 1] if bool(padding.any()) else []
    else:
        seen = reference.visible(lengths, seq_len, reference.causal)[:, None]
        least = torch.finfo(torch.float32).min
        mask = seen if draw.chance() else torch.zeros(seen.shape).masked_fill(~seen, least)
        expected, restarting = lengths, draw.choice((None, position_ids))
        others = [mask[0], mask[:, 0], mask[..., :0], mask.long(), None]
        # Of one token it says that all are padding.
        if seq_len > 1 or mask.dtype != torch.bool:
            others += [~mask if mask.dtype == torch.bool else mask + 1]
    marks = padding_of_mask(draw.bad("mask", mask, *[x for x in others if not readable(x)]))
    assert torch.equal(marks, padding)
    given = draw.bad("mask", mask, *others)
    more = rows + 1 if mask.ndim == 2 or len(mask) > 1 else 0
    sizes = draw.bad("rows", rows, more), draw.bad("seq_len", seq_len, seq_len + 1)
    assert documents_of_mask(given, restarting, *sizes).lengths == expected


def readable(mask):
    """Whether `padding_of_mask` may read a mask as one, with another meaning."""
    return isinstance(mask, torch.Tensor) and mask.ndim in (2, 4)


def batches_on_one_rank(draw):
    rows, seq_len = draw.integer(1, 2), draw.integer(1, 12)
    ids = draw.ids(rows, seq_len)
    wrong = [ids[0, 0], ids[:, :0], ids.tolist(), None, 3]
    kind = draw.integer(0, 3)
    given = draw.bad("input_ids", ids, *wrong) if kind in (0, 2) else ids
    batch = {"input_ids": given, "labels": ids}
    wrong = [torch.cat((ids, ids), 1), ids[0], None, 3]
    if kind == 0:
        batch["labels"] = draw.bad("labels", ids, *wrong)
        multiple = draw.integer(1, 5)
        wrong = [1.5, "2"]
        pad = draw.bad("pad_multiple", multiple, *wrong)
        _, local = make_dsv4_contiguous_shard_cp_batch_and_ctx(None, None, batch, pad_multiple=pad)
        length = local["input_ids"].shape[1]
        assert length % max(2, multiple) == 0
        assert torch.equal(local["input_ids"], picked(ids, range(length), 1, 0))
        assert torch.equal(local["labels"], picked(ids, range(length), 1, IGNORED))
    elif kind == 1:
        given = draw.bad("input_ids", ids, ids[0], ids[None], None, [1])
        position_ids = torch.arange(seq_len)[None]
        wrong = [position_ids[:, :0], position_ids[0], position_ids.tolist(), 3]
        wrong += [torch.cat((position_ids,) * (rows + 1))]
        positions = draw.bad("position_ids", position_ids, *wrong)
        _, local, counted, length = make_target_cp_ctx(None, given, positions)
        assert torch.equal(local, ids) and length == seq_len
        assert torch.equal(counted, position_ids.expand(rows, -1))
    elif kind == 2:
        out = _build_position_ids(dict(batch), "cpu")
        assert out["position_ids"].tolist() == [list(range(seq_len))]
        check_rows(batch, "input_ids", ("input_ids", "labels"))
    else:
        batch = draw.bad("batch", batch, None, [ids])
        _, local = make_cp_batch_and_ctx(None, batch)
        draw.may_be_refused("one rank does not read its batch")
        draw.is_bad = not isinstance(batch, dict)
        assert local["input_ids"] is batch["input_ids"]


def dense_masks_of_deepseek(draw):
    rows, seq_len = draw.integer(1, 2), draw.integer(1, 9)
    position_ids = torch.arange(seq_len).expand(rows, -1)
    wrong = [position_ids[None], position_ids.double() + 0.5, position_ids[0, 0], None, [1]]
    positions = draw.bad("position_ids", position_ids, *wrong)
    length = draw.bad("key_len", seq_len, -1, 1.5, None)
    window = draw.choice((None, draw.integer(1, 5)))
    size = draw.bad("sliding_window", window, 0, -1, 1.5, "3")
    dtype = draw.bad("dtype", torch.float32, torch.int64, torch.bool, None)
    padding = draw.choice((None, torch.rand(rows, seq_len, generator=draw.generator) < 0.3))
    if padding is not None:
        wrong = [padding[0], torch.cat((padding, padding), 1), [[True]], 3]
        padding_given = draw.bad("padding_mask", padding, *wrong)
    else:
        padding_given = None
    mask = build_dsv4_cp_causal_padding_mask(
        positions, length, dtype, "cpu", None, padding_given, size
    )
    for row in range(rows):
        for query in range(seq_len):
            for key in range(seq_len):
                seen = key <= query and (window is None or query - key < window)
                seen = seen and (padding is None or not padding[row, key])
                assert (mask[row, 0, query, key] == 0) == seen


def batches_of_collators(draw):
    rows, seq_len = draw.integer(1, 2), draw.integer(2, 12)
    lengths = [draw.lengths(seq_len) or (1,) for _ in range(rows)]
    padding, position_ids = of_rows(lengths, seq_len, 0) < 0, of_rows(lengths, seq_len, 1)
    ids = draw.ids(rows, seq_len)
    mask = (~padding).long()
    others = [mask[0], mask[:, :0], mask.flip(1) if bool(padding.any()) else mask[0], [[1]], 3]
    batch = {"input_ids": draw.bad("input_ids", ids, ids[0, 0], None, ids.tolist())}
    batch["attention_mask"] = draw.bad("attention_mask", mask, *others)
    wrong = [position_ids[:, 1:], position_ids[0], position_ids.double() + 0.5, [[0]]]
    batch["position_ids"] = draw.bad("position_ids", position_ids, *wrong)
    for key in draw.bad("missing", (), ("input_ids",)):
        del batch[key]
    assert documents_of_hf_batch(batch).lengths == tuple(lengths)


def losses(draw):
    rows, seq_len, words = draw.integer(1, 2), draw.integer(1, 6), draw.integer(1, 9)
    logits = draw.floats(rows, seq_len, words)
    labels = torch.randint(0, words, (rows, seq_len), generator=draw.generator)
    labels[torch.rand(labels.shape, generator=draw.generator) < 0.3] = IGNORED
    wrong = [labels[:, :0], labels[0, 0], labels.double(), labels.bool(), None, labels.tolist()]
    given = draw.bad("labels", labels, *wrong)
    assert int(global_token_count(given, None)) == int((given != IGNORED).sum())
    count = int((labels != IGNORED).sum())
    wrong = [logits[0], logits.long(), logits[0, 0, 0], None]
    scores = draw.bad("logits", logits, *wrong)
    total = draw.bad("global_tokens", count, -1, 1.5, None, "3")
    loss = token_mean_loss(scores, given, total)
    summed = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(loss, summed / max(count, 1))
    depths = draw.integer(1, 2)
    ahead = torch.stack([labels] * depths, dim=1)
    wrong = [ahead[:, :0], ahead[0, 0], ahead.double(), None]
    further = draw.bad("mtp_labels", ahead, *wrong)
    several = draw.bad("logits", [logits] * (depths + 1), [logits] * (depths + 2), [], None)
    loss = mtp_loss(several, labels, further, count, weight=0.5)
    torch.testing.assert_close(loss, 1.5 * summed / max(count, 1))


def spoiled_part(draw, name, x):
    """A tensor [B, L, ..], or one of other dims or another dtype."""
    others = [x[:, :-1], torch.cat((x, x), 1), x[0], x.float(), x.long(), None, x[..., None], 3]
    return draw.bad(name, x, *others)


def attention_on_one_device(draw):
    seq_len = draw.integer(2, 12)
    documents = Documents(draw.rows(draw.integer(1, 2), seq_len), seq_len)
    prefix, block = prefix_of(draw, documents), block_of(draw, documents)
    mask, rule = a_mask(draw, documents, 1)
    scale = draw.choice((None, 0.3))
    softcap = draw.choice((0.0, 2.0))
    mixer = SoftmaxAttention(mask, scale=scale, softcap=softcap)
    metadata = batch_metadata(mixer, documents, prefix=prefix, block=block)
    rows, groups, width = documents.batch, draw.integer(1, 2), draw.choice((1, 4))
    heads = groups * draw.integer(1, 2)
    q, k, v = (
        draw.floats(rows, seq_len, n, d)
        for n, d in ((heads, width), (groups, width), (groups, draw.choice((1, 3))))
    )
    sink = draw.choice((None, draw.floats(heads)))
    given = None if sink is None else draw.bad("sink", sink, sink[None], sink[:0], 3)
    parts = [spoiled_part(draw, name, x) for name, x in (("q", q), ("k", k), ("v", v))]
    other = batch_metadata(SoftmaxAttention(Causal(), scale=1.0), documents.padded(seq_len + 1))
    metadata = draw.bad("attn_metadata", metadata, None, other, {}, 3)
    out = mixer(*parts, metadata, sink=given)
    visible = reference.visible(documents.lengths, seq_len, the_rule(rule, prefix, block))
    options = {"scale": scale, "softcap": softcap, "sink": sink}
    expected, _ = reference.attention(q, k, v, visible, **options)
    torch.testing.assert_close(out, expected)


def recurrence_on_one_device(draw):
    seq_len = draw.integer(2, 10)
    documents = Documents(draw.rows(draw.integer(1, 2), seq_len), seq_len)
    rows, lengths = documents.batch, documents.lengths
    if draw.chance():
        width, channels = draw.integer(1, 4), draw.integer(1, 3)
        mixer = CausalConv1d(draw.bad("width", width, 0, -1, 1.5, None))
        metadata = batch_metadata(mixer, documents)
        x, weight = draw.floats(rows, seq_len, channels), draw.floats(channels, width)
        taps = draw.bad("weight", weight, weight[:, :0], weight[0], weight.t()[None], None, 3)
        others = [x[:, :-1], torch.cat((x, x), 1), x[0], x[..., None], None, x.long()]
        out = mixer(draw.bad("x", x, *others), taps, metadata)
        torch.testing.assert_close(out, reference.causal_conv(x, weight, lengths))
        return
    groups, width = draw.integer(1, 2), draw.integer(1, 4)
    heads = groups * draw.integer(1, 2)
    q, k = (draw.floats(rows, seq_len, groups, width) for _ in range(2))
    v = draw.floats(rows, seq_len, heads, draw.integer(1, 3))
    g, beta = -draw.floats(rows, seq_len, heads).abs(), draw.floats(rows, seq_len, heads).sigmoid()
    mixer = GatedDeltaRule()
    metadata = batch_metadata(mixer, documents)
    named = {"q": q, "k": k, "v": v, "g": g, "beta": beta}
    parts = [
        x if name in ("g", "beta") else spoiled_part(draw, name, x) for name, x in named.items()
    ]
    others = [g[:, 1:], g[0], g.long(), None, g[..., None].expand(*g.shape, width + 1), 3]
    parts[3] = draw.bad("g", g, *others)
    others = [beta[:, 1:], beta[0], beta.long(), None, beta[..., None], 3]
    parts[4] = draw.bad("beta", beta, *others)
    out = mixer(*parts, metadata)
    truth = reference.gated_delta_rule(reference.DeltaRule(q, k, v, g, beta), lengths)
    torch.testing.assert_close(out, truth)


def settings(draw):
    """Of masks, styles and mixers: ints, and nothing else."""
    number = draw.integer(1, 8)
    given = draw.bad("setting", number, 0, -1, 1.5, None, "2", True)
    kind = draw.integer(0, 6)
    if kind == 0:
        assert HaloAttention(given).window == number
        HaloAttention(number, right=draw.bad("right", 2, -1, 0.5, None))
    elif kind == 1:
        assert HybridAttention(inner_ranks=given).inner_ranks == number
    elif kind == 2:
        selected = draw.choice((None, 3))
        wrong = [0, -1, 1.5, "2"]
        assert Compression(given, selected=draw.bad("selected", selected, *wrong)).ratio == number
    elif kind == 3:
        mixer = CompressedSparseAttention(given, None, scale=1.0)
        assert mixer.window == number
    elif kind == 4:
        assert Degrees(cp=given).world == number
    elif kind == 5:
        assert RingAttention(tile=given).tile == number
    else:
        mask = draw.bad("mask", Causal(), None, "causal", Causal)
        scale = draw.bad("scale", draw.choice((None, 0.5, 1)), "1", torch.ones(2), True)
        softcap = draw.bad("softcap", draw.choice((0.0, 2, 0.5)), -1.0, None, "1")
        SoftmaxAttention(mask, scale=scale, softcap=softcap)
        draw.is_bad = draw.is_bad and any(x != "setting" for x in draw.unsound)


SUBJECTS = (
    settings,
    sharded_batches,
    batches_that_tell_their_documents,
    rows_to_thd,
    chunks_of_rows,
    partitions_of_thd,
    attention_on_thd,
    masks_of_batches,
    batches_on_one_rank,
    dense_masks_of_deepseek,
    batches_of_collators,
    losses,
    attention_on_one_device,
    recurrence_on_one_device,
)


@pytest.mark.parametrize(
    "cases", [range(CASES), pytest.param(range(CASES, MANY), marks=pytest.mark.slow)], ids=len
)
def test_fuzzed_batches_are_exact_or_refused(cases, capsys):
    tally = run_cases(SUBJECTS, cases)
    with capsys.disabled():
        tally.check()
