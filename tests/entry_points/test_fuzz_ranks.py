"""Calls that ranks make together, on random arguments: the same on all of them, or refused on all.

Every rank draws the same case. After each they compare what came of it, so a rank that answers
where another refuses is found, and one that waits for another ends the test, which names the case.
"""

from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch.nn import ModuleList
from torch.nn import functional as F

from dtcp.batch import shard_batch
from dtcp.cp_utils import (
    create_context_parallel_ctx,
    gather_cp_seq,
    make_cp_batch_and_ctx,
    make_cp_batch_for_te,
    make_target_cp_ctx,
)
from dtcp.distributed import relayout
from dtcp.distributed.collectives import all_gather, all_to_all, halo, reduce_scatter, ring_shift
from dtcp.distributed.mesh import ParallelMesh
from dtcp.labels import IGNORED, shift_labels
from dtcp.mixer_metadata import batch_metadata
from dtcp.mixer_plan import apply_plan
from dtcp.recurrent import CausalConv1d, CausalConvCP, GatedDeltaCP, GatedDeltaRule
from dtcp.sequence.block_balanced import BlockBalanced
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import Contiguous, HeadTail
from dtcp.sequence.masks import Causal, SlidingWindow
from dtcp.sequence.per_document import PerDocument
from dtcp.softmax import HaloAttention
from dtcp.softmax.mixer import KeysFromValues, SoftmaxAttention
from tests.entry_points.test_fuzz_batches import picked, spoiled_part, thd_of
from tests.entry_points.test_fuzz_planning import (
    a_layout,
    a_mask,
    block_of,
    prefix_of,
    the_rule,
    tokens_of,
)
from tests.entry_points.test_fuzz_sparse import compressed_attention_across_ranks
from tests.harness import reference
from tests.harness.attention_parity import mixer_on, styles
from tests.harness.fuzz import Tally, run_case
from tests.harness.spmd import RankError, run_ranks

RANKS = 2
CASES = 120
MANY = 2000
PER_JOB = 60
SECONDS = 120.0
LAYOUTS = (Contiguous, HeadTail, PerDocument, BlockBalanced)


def a_batch(draw, mesh, mixer, layout, documents, **masks):
    """shard_batch of rows with these documents, for one mixer."""
    batch = {"input_ids": draw.ids(documents.batch, documents.seq_len), **masks}
    whole = ParallelMesh.from_device_mesh(mesh)
    return shard_batch(batch, whole, layout, model=mixer, documents=documents)[1]


def documents_for(draw, layout):
    seq_len = draw.integer(1, 24)
    alike = layout in (PerDocument, BlockBalanced)
    return Documents(draw.rows(draw.integer(1, 2), seq_len, alike=alike), seq_len)


def whole_gradients(plan, expected, grad_out, inputs):
    """What each rank's part of the gradients should be."""
    return [plan.shard(x) for x in torch.autograd.grad(expected, inputs, grad_out)]


def attention_across_ranks(draw, mesh, known):
    style, layout = draw.choice(known), draw.choice(LAYOUTS)
    documents = documents_for(draw, layout)
    prefix, block = prefix_of(draw, documents), block_of(draw, documents)
    if isinstance(style, HaloAttention):
        size, right = draw.integer(1, 7), draw.integer(0, 4)
        mask, rule = SlidingWindow(size, right=right), reference.Window(size, right)
    else:
        mask, rule = a_mask(draw, documents, 1)
    if layout not in style.layouts:
        draw.may_be_refused("a layout that the style does not take")
    mixer = mixer_on(mesh, style, mask)
    plan = a_batch(draw, mesh, mixer, layout, documents, prefix=prefix, block=block)
    rows, seq_len, n = documents.batch, documents.seq_len, mesh.size()
    groups = n * draw.integer(1, 2)
    heads, width = groups * draw.integer(1, 2), draw.choice((2, 4))
    shapes = ((heads, width), (groups, width), (groups, draw.choice((width, 3))))
    q, k, v = (draw.floats(rows, seq_len, *shape).requires_grad_() for shape in shapes)
    grad_out = draw.floats(rows, seq_len, heads, shapes[2][1])
    local = [plan.shard(x.detach()).requires_grad_() for x in (q, k, v)]
    given = [spoiled_part(draw, name, x) for name, x in zip("qkv", local, strict=True)]
    other = batch_metadata(SoftmaxAttention(Causal()), documents)
    attn_metadata = draw.bad("attn_metadata", plan.attn_metadata, None, other, 3)
    out = mixer(*given, attn_metadata)
    visible = reference.visible(documents.lengths, seq_len, the_rule(rule, prefix, block))
    expected, _ = reference.attention(q, k, v, visible)
    torch.testing.assert_close(out, plan.shard(expected))
    torch.testing.assert_close(plan.gather(out.detach()), expected)
    grads = torch.autograd.grad(out, local, plan.shard(grad_out))
    torch.testing.assert_close(list(grads), whole_gradients(plan, expected, grad_out, (q, k, v)))


def keys_from_values_across_ranks(draw, mesh, known):
    style = draw.choice(known[:2])
    layout = draw.choice(LAYOUTS)
    documents = documents_for(draw, layout)
    mixer = KeysFromValues(Causal())
    apply_plan(ModuleList([mixer]), mesh, {"0": style})
    plan = a_batch(draw, mesh, mixer, layout, documents)
    rows, seq_len = documents.batch, documents.seq_len
    q, v = draw.floats(rows, seq_len, 2, 4), draw.floats(rows, seq_len, 1, 4)
    scale, frequency = draw.floats(4), torch.rand(2, generator=draw.generator)
    positions = plan.shard(documents.position_ids())
    named = {"q": plan.shard(q), "v": plan.shard(v)}
    parts = [spoiled_part(draw, name, x) for name, x in named.items()]
    wrong = [scale[:2], scale[None, None], None, 3]
    factors = draw.bad("key_scale", scale, *wrong)
    turns = draw.bad("frequency", frequency, frequency[:1], frequency[None], None, 3)
    wrong = [positions[:, 1:], positions[0], None, 3, positions.double()]
    given = draw.bad("position_ids", positions, *wrong)
    out = mixer(*parts, given, factors, turns, plan.attn_metadata)
    one = KeysFromValues(Causal())
    metadata = batch_metadata(one, documents)
    expected = one(q, v, documents.position_ids(), scale, frequency, metadata)
    torch.testing.assert_close(plan.gather(out), expected)


def recurrence_across_ranks(draw, mesh, known):
    layout = draw.choice(LAYOUTS)
    if layout in (PerDocument, BlockBalanced):
        draw.may_be_refused("a layout without equal segments")
    seq_len = draw.integer(8, 24)
    alike = layout in (PerDocument, BlockBalanced)
    documents = Documents(draw.rows(draw.integer(1, 2), seq_len, alike=alike), seq_len)
    rows, lengths = documents.batch, documents.lengths
    if draw.chance():
        width, channels = draw.integer(1, 3), draw.integer(1, 3)
        mixer = CausalConv1d(width)
        apply_plan(ModuleList([mixer]), mesh, {"0": CausalConvCP()})
        plan = a_batch(draw, mesh, mixer, layout, documents)
        x, weight = draw.floats(rows, seq_len, channels), draw.floats(channels, width)
        taps = draw.bad("weight", weight, weight[:, :0], weight[0], None, 3)
        part = plan.shard(x)
        others = [part[:, :-1], torch.cat((part, part), 1), part[0], part[..., None], None]
        out = mixer(draw.bad("x", part, *others), taps, plan.attn_metadata)
        torch.testing.assert_close(plan.gather(out), reference.causal_conv(x, weight, lengths))
        return
    mixer = GatedDeltaRule()
    apply_plan(ModuleList([mixer]), mesh, {"0": GatedDeltaCP()})
    plan = a_batch(draw, mesh, mixer, layout, documents)
    q, k = (draw.floats(rows, seq_len, 1, 3) for _ in range(2))
    v = draw.floats(rows, seq_len, 2, 2)
    g, beta = -draw.floats(rows, seq_len, 2).abs(), draw.floats(rows, seq_len, 2).sigmoid()
    named = {"q": q, "k": k, "v": v}
    parts = [spoiled_part(draw, name, plan.shard(x)) for name, x in named.items()]
    for name, x in (("g", plan.shard(g)), ("beta", plan.shard(beta))):
        parts.append(draw.bad(name, x, x[:, 1:], x[0], x.long(), None, 3))
    out = mixer(*parts, plan.attn_metadata)
    truth = reference.gated_delta_rule(reference.DeltaRule(q, k, v, g, beta), lengths)
    torch.testing.assert_close(plan.gather(out), truth)


def every_rank_has(draw, mesh, *shape):
    """A tensor of every rank, and this rank's."""
    parts = [draw.floats(*shape) for _ in range(mesh.size())]
    return parts, parts[mesh.get_local_rank()]


def collectives_of_ranks(draw, mesh, known):
    n, rank = mesh.size(), mesh.get_local_rank()
    dims = draw.integer(1, 3)
    dim = draw.integer(0, dims - 1)
    shape = [draw.integer(1, 3) * (n if d == dim else 1) for d in range(dims)]
    parts, mine = every_rank_has(draw, mesh, *shape)
    at = draw.choice((dim, dim - dims))
    at = draw.bad("dim", at, dims, -dims - 1, 1.0, None)
    x = draw.bad("x", mine, None, 3, mine.tolist())
    kind = draw.integer(0, 3)
    if kind == 0:
        assert torch.equal(all_gather(x, mesh, dim=at), torch.cat(parts, dim))
    elif kind == 1:
        size = shape[dim] // n
        total = torch.stack(parts).sum(0).narrow(dim, rank * size, size)
        torch.testing.assert_close(reduce_scatter(x, mesh, dim=at), total)
    elif kind == 2:
        draw.is_bad = draw.is_bad and any(name != "dim" for name in draw.unsound)
        by = draw.integer(-3, 3)
        moved = ring_shift(x, mesh, by=draw.bad("by", by, 1.5, None, "1"))
        assert torch.equal(moved, parts[(rank - by) % n])
    else:
        draw.is_bad = draw.is_bad and any(name != "dim" for name in draw.unsound)
        counts = torch.full((n,), shape[0] // n).tolist()
        counts[0] += shape[0] - sum(counts)
        wrong = [counts[:-1], [*counts[:-1], -1], [float(c) for c in counts], None]
        send = draw.bad("send", counts, *wrong, [c + 1 for c in counts])
        receive = [counts[rank]] * n
        wrong = [receive[:-1], [-1] * n, None, [1.5] * n]
        moved = all_to_all(x, mesh, receive=draw.bad("receive", receive, *wrong), send=send)
        start = sum(counts[:rank])
        assert torch.equal(moved, torch.cat([p[start : start + counts[rank]] for p in parts]))


def tokens_that_move(draw, mesh, known):
    n, rank = mesh.size(), mesh.get_local_rank()
    layout = a_layout(draw, n)
    dims = draw.integer(1, 3)
    dim = draw.integer(0, dims - 1)
    S, tokens = layout.seq_len, tokens_of(layout)
    whole = draw.floats(*[S if d == dim else draw.integer(1, 3) for d in range(dims)])
    mine = picked(whole, tokens[rank], dim, 0)
    at = draw.bad("dim", draw.choice((dim, dim - dims)), dims, -dims - 1, 1.0, None)
    wrong = [torch.cat((mine, mine), dim), mine.narrow(dim, 0, mine.shape[dim] - 1), None, 3]
    x = draw.bad("x", mine, *wrong)
    other = Contiguous(S + n, n)
    by = draw.bad("layout", layout, other, Contiguous(S, 1) if n > 1 else None, None)
    kind = draw.integer(0, 4)
    if kind == 0:
        assert torch.equal(relayout.gather(x, by, mesh, dim=at), whole)
    elif kind == 1:
        given = draw.bad("whole", whole, torch.cat((whole, whole), dim), None)
        draw.is_bad = draw.is_bad and draw.unsound != ["x"]
        assert torch.equal(relayout.shard(given, by, mesh, dim=at), mine)
    elif kind == 2:
        target = Contiguous(S, n)
        to = draw.bad("target", target, other, None, Contiguous)
        moved = relayout.relayout(x, by, to, mesh, dim=at)
        assert torch.equal(moved, picked(whole, tokens_of(target)[rank], dim, 0))
    elif kind == 3:
        shift = draw.integer(-S - 1, S + 1)
        moved = relayout.roll(x, by, mesh, shift=draw.bad("shift", shift, 1.5, None), dim=at)
        expected = [(t - shift) % S for t in tokens[rank]]
        assert torch.equal(moved, picked(whole, expected, dim, 0))
    else:
        left, right = draw.integer(0, 4), draw.integer(0, 3)
        sides = {
            "left": draw.bad("left", left, -1, 0.5, None),
            "right": draw.bad("right", right, -1, 0.5, None),
        }
        moved = halo(x, by, mesh, **sides, dim=at)
        expected = []
        for start, stop in layout.segments(rank):
            expected += [*range(start - left, start), *range(stop, stop + right)]
        expected = [t if t >= 0 else S for t in expected]
        if expected:
            assert torch.equal(moved, picked(whole, expected, dim, 0))


def one_rank_reads_nothing(draw, ranks):
    """Nothing is cut on one rank, so nothing has to be refused there."""
    if ranks == 1:
        draw.may_be_refused("one rank")
        draw.is_bad = False


def contexts_of_a_step(draw, mesh, known):
    """F.scaled_dot_product_attention on buffers that the context shards."""
    n, rank = mesh.size(), mesh.get_local_rank()
    rows, seq_len = draw.integer(1, 2), 2 * n * draw.integer(1, 4)
    q = draw.floats(rows, 2, seq_len, 4)
    x = draw.floats(rows, seq_len)
    buffers = [q.clone(), x.clone()]
    wrong = [[buffers[0]], [], [buffers[0], x[:, 1:]], None, [q.clone(), None], [q, x.tolist()]]
    given = draw.bad("cp_buffers", buffers, *wrong, [q.clone().requires_grad_(), x.clone()])
    wrong = [[2], [2, 2], [7, 1], [2, -3], [2.0, 1], None, [2, None], [1, 1]]
    dims = draw.bad("cp_seq_dims", draw.choice(([2, 1], [-2, -1])), *wrong)
    kept = draw.bad("cp_no_restore_buffers", set(), {x}, None)
    method = draw.choice((None, "allgather", "alltoall"))
    method = draw.bad("cp_rotate_method", method, "ring", 3)
    one_rank_reads_nothing(draw, n)
    with create_context_parallel_ctx(mesh, given, dims, kept, method):
        tokens = tokens_of(HeadTail(seq_len, n))[rank]
        assert torch.equal(buffers[1], x[:, tokens])
        out = F.scaled_dot_product_attention(buffers[0], buffers[0], buffers[0], is_causal=True)
    whole = F.scaled_dot_product_attention(q, q, q, is_causal=True)
    torch.testing.assert_close(out, whole[:, :, tokens])
    assert torch.equal(buffers[0], q) and torch.equal(buffers[1], x)


def batches_of_training_loops(draw, mesh, known):
    n, rank = mesh.size(), mesh.get_local_rank()
    if draw.chance():
        batch, slots = thd_of(draw, n)
        wrong = [{**batch, "seq_lens": batch["seq_lens"] + 999}, {**batch, "labels": None}, None]
        given = draw.bad("batch", batch, *wrong, {**batch, "seq_lens": batch["seq_lens"][0]})
        out = make_cp_batch_for_te(mesh, given)
        mine, start = [], 0
        for _, slot in slots:
            part = slot // (2 * n)
            head, tail = start + rank * part, start + (2 * n - 1 - rank) * part
            mine += [*range(head, head + part), *range(tail, tail + part)]
            start += slot
        assert torch.equal(out["input_ids"], batch["input_ids"].flatten()[mine])
        return
    rows, seq_len = draw.integer(1, 2), draw.integer(1, 16)
    ids = draw.ids(rows, seq_len)
    wrong = [ids[0], ids[:, :0], ids.tolist(), None, 3]
    batch = {"input_ids": draw.bad("input_ids", ids, *wrong)}
    batch["labels"] = draw.bad("labels", ids, torch.cat((ids, ids), 1), ids[0], None, 3)
    counted = torch.arange(seq_len)[None]
    wrong = [counted[:, :0], counted[0], counted.double() + 0.5, 3]
    batch["position_ids"] = draw.bad("position_ids", counted, *wrong)
    mask = torch.ones(rows, seq_len, dtype=torch.int64)
    wrong = [mask[0], mask - 2, mask[:, :0], 3, mask * 2]
    batch["attention_mask"] = draw.bad("attention_mask", mask, *wrong)
    opened, local = make_cp_batch_and_ctx(mesh, batch)
    if n == 1:
        one_rank_reads_nothing(draw, n)
        assert local["labels"] is batch["labels"]
        return
    padded = -(-seq_len // (2 * n)) * 2 * n
    mine = tokens_of(HeadTail(padded, n))[rank]
    assert torch.equal(local["labels"], picked(ids, mine, 1, IGNORED))
    with opened():
        pass


def targets_of_ranks(draw, mesh, known):
    n = mesh.size()
    rows, seq_len = draw.integer(1, 2), draw.integer(1, 12)
    ids = draw.ids(rows, seq_len)
    given = draw.bad("input_ids", ids, ids[0], ids[:, :0], None, ids.tolist())
    positions = torch.arange(seq_len)[None]
    wrong = [positions[:, :0], positions[0], positions + 1, positions.double() + 0.5, 3]
    positions = draw.bad("position_ids", positions, *wrong)
    one_rank_reads_nothing(draw, n)
    context, local, _, length = make_target_cp_ctx(mesh, given, positions)
    with context:
        x = local.double()[..., None].expand(-1, -1, 3)
    dim = draw.bad("seq_dim", draw.choice((1, -2)), 3, -4, 1.0, None)
    size = draw.bad("orig_len", length, length + n, -1, 1.5, None)
    tensors = draw.bad("tensors", [x], [None], None, 3)
    (whole,) = gather_cp_seq(mesh, tensors, dim, size)
    assert torch.equal(whole, ids.double()[..., None].expand(-1, -1, 3))


def rows_of_one_rank(draw, mesh, known):
    """One rank reads another batch than the others, or one that is refused there."""
    n, rank = mesh.size(), mesh.get_local_rank()
    kind = draw.choice((Contiguous, HeadTail))
    rows, seq_len = draw.integer(1, 3), draw.integer(2, 16)
    documents = Documents(draw.rows(rows, seq_len), seq_len)
    ids = draw.ids(rows, seq_len)
    batch = {"input_ids": ids, "document_ids": documents.document()}
    if draw.chance():
        batch["labels"] = shift_labels(ids, documents)
    numbers, apart = batch["document_ids"], torch.arange(seq_len).repeat(rows, 1)
    others = [
        {"input_ids": torch.cat((ids[:, :1] + 1, ids[:, 1:]), 1)},
        {"input_ids": ids[:, 1:], "document_ids": numbers[:, 1:]},
        {"input_ids": torch.cat((ids, ids)), "document_ids": torch.cat((numbers, numbers))},
        {"document_ids": apart if not torch.equal(apart, numbers) else apart * 0},
        {"input_ids": None},
        {"weights": ids},
        {"loss_mask": torch.ones(rows, seq_len)},
    ]
    changed = draw.bad("the batch of one rank", None, *others) if n > 1 else None
    one = draw.integer(0, n - 1)
    if changed is not None and rank == one:
        batch |= changed
    local, sharded = shard_batch(batch, ParallelMesh.from_device_mesh(mesh), kind)
    assert torch.equal(local["input_ids"], picked(ids, tokens_of(sharded.layout)[rank], 1, 0))
    assert torch.equal(sharded.gather(local["input_ids"]), ids)


SUBJECTS = (
    attention_across_ranks,
    attention_across_ranks,
    rows_of_one_rank,
    compressed_attention_across_ranks,
    keys_from_values_across_ranks,
    recurrence_across_ranks,
    collectives_of_ranks,
    tokens_that_move,
    contexts_of_a_step,
    batches_of_training_loops,
    targets_of_ranks,
)


def run_job(mesh, cases, folder):
    """The cases on this rank, which writes down where it is; verdicts are compared at once."""
    tally, known = Tally(), styles(mesh.size())
    place = Path(folder, f"rank{mesh.get_local_rank()}")
    for case in cases:
        subject = SUBJECTS[case % len(SUBJECTS)]
        place.write_text(f"{subject.__name__}, case {case}")
        verdict, report = run_case(subject, case, mesh, known)
        verdicts = [None] * mesh.size()
        dist.all_gather_object(verdicts, (case, verdict), group=mesh.get_group())
        if len(set(verdicts)) > 1:
            verdict, report = "wrong", f"wrong: the ranks differ: {verdicts}\n{report}"
        tally.add(verdict, report)
    return tally


def run_jobs(cases, ranks, folder):
    """All cases, some at a time; a rank that raised or hung is reported with where it was."""
    tally = Tally()
    for first in range(cases.start, cases.stop, PER_JOB):
        part = range(first, min(first + PER_JOB, cases.stop))
        try:
            answers = run_ranks(run_job, ranks, part, str(folder), timeout=SECONDS)
        except RankError as error:
            places = [path.read_text() for path in sorted(folder.iterdir())]
            raise AssertionError(f"The ranks stopped in {places}:\n{error}") from None
        one, *others = answers
        for other in others:
            one.failures += [x for x in other.failures if x not in one.failures]
        tally.merge(one)
    return tally


@pytest.mark.spmd(RANKS)
@pytest.mark.parametrize(
    "cases", [range(CASES), pytest.param(range(CASES, MANY), marks=pytest.mark.slow)], ids=len
)
def test_fuzzed_calls_of_two_ranks_are_exact_or_refused_alike(cases, tmp_path, capsys):
    tally = run_jobs(cases, RANKS, tmp_path)
    with capsys.disabled():
        tally.check()


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 3, 4])
def test_fuzzed_calls_of_other_numbers_of_ranks_are_exact_or_refused_alike(ranks, tmp_path):
    run_jobs(range(90), ranks, tmp_path).check()
