"""Compressed sparse attention on random operands: the definition, query by query, or a refusal."""

from itertools import accumulate, pairwise

import pytest
import torch
from torch import nn

from dtcp.batch import shard_batch
from dtcp.distributed.mesh import ParallelMesh
from dtcp.mixer_metadata import batch_metadata
from dtcp.mixer_plan import apply_plan
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import Contiguous, HeadTail
from dtcp.sparse import CompressedSparseCP
from dtcp.sparse.mixer import CompressedSparseAttention, Index, Prepool
from tests.harness.fuzz import run_cases
from tests.sparse.test_sparse import (
    DIM,
    HEADS,
    INDEX_DIM,
    INDEX_HEADS,
    KINDS,
    SHARED,
    WINDOW,
    Inputs,
    finish,
    one_document,
    pooled,
)

CASES = 40
MANY = 1_000


def operands(draw, kind, rows, seq_len):
    """Of whole rows, by name."""
    halves = 2 if kind is not None and kind.overlap else 1
    ratio = 1 if kind is None else kind.ratio
    wide, narrow = halves * DIM, halves * INDEX_DIM
    shapes = {
        "q": (rows, seq_len, HEADS, DIM),
        "keys": (rows, seq_len, DIM),
        "sink": (HEADS,),
        "value": (rows, seq_len, wide),
        "gate": (rows, seq_len, wide),
        "bias": (ratio, wide),
        "index_q": (rows, seq_len, INDEX_HEADS, INDEX_DIM),
        "index_weight": (rows, seq_len, INDEX_HEADS),
        "index_value": (rows, seq_len, narrow),
        "index_gate": (rows, seq_len, narrow),
        "index_bias": (ratio, narrow),
    }
    return {name: draw.floats(*shape) for name, shape in shapes.items()}


def brute_force(x, kind, documents):
    """Each document alone."""
    rows = []
    for row, lengths in enumerate(documents.lengths):
        start, parts = 0, [x["q"].new_zeros(0, HEADS, DIM)]
        for length in lengths:
            cut = {n: v if n in SHARED else v[row, start : start + length] for n, v in x.items()}
            parts.append(one_document(Inputs(**cut), kind))
            start += length
        out = torch.cat(parts)
        rows.append(nn.functional.pad(out, (0, 0, 0, 0, 0, documents.seq_len - start)))
    return torch.stack(rows)


def decided(x, kind, documents):
    """Tokens whose entries the definition picks; of equal scores (0) any may be."""
    real = documents.document() >= 0
    if kind is None or kind.selected is None:
        return real
    for row, lengths in enumerate(documents.lengths):
        for start, stop in pairwise(accumulate(lengths, initial=0)):
            parts = [x[name][row, start:stop] for name in ("index_value", "index_gate")]
            entries = pooled(*parts, x["index_bias"], kind)
            for query in range(start, stop):
                closed = entries[: (query - start + 1) // kind.ratio]
                scores = (
                    x["index_weight"][row, query] @ (x["index_q"][row, query] @ closed.T).relu()
                )
                best = scores.sort(descending=True).values
                tied = best[kind.selected - 1 : kind.selected + 1]
                real[row, query] &= len(tied) < 2 or tied[0] != tied[1]
    return real


def read_by(kind):
    """The operands that a mixer of this kind reads."""
    names = ["q", "keys", "sink"]
    if kind is not None:
        names += ["value", "gate", "bias"]
    if kind is not None and kind.selected is not None:
        names += ["index_q", "index_weight", "index_value", "index_gate", "index_bias"]
    return names


def called(draw, mixer, x, metadata):
    """The mixer on its operands, of which some may be spoiled."""
    kind = mixer.compression
    x = dict(x)
    for name in read_by(kind):
        sound = x[name]
        others = [sound[..., :-1], sound[0], sound.long(), sound[None], None, 3]
        if name in ("q", "keys", "value"):
            others.append(sound.float())
        if name.endswith("bias"):
            others.append(torch.cat((sound, sound)))
        if name not in SHARED:
            others += [sound[:, 1:], torch.cat((sound, sound), 1)]
        x[name] = draw.bad(name, sound, *others)
    tokens = None if kind is None else Prepool(x["value"], x["gate"], x["bias"], finish)
    index = None
    if kind is not None and kind.selected is not None:
        keys = Prepool(x["index_value"], x["index_gate"], x["index_bias"], finish)
        index = Index(x["index_q"], x["index_weight"], keys)
    tokens = draw.bad("tokens", tokens, (None if tokens else Prepool(*[x["keys"]] * 3, finish)), 3)
    index = draw.bad("index", index, 3, *([None] if index else []))
    metadata = draw.bad("attn_metadata", metadata, None, {}, 3)
    return mixer(x["q"], x["keys"], metadata, sink=x["sink"], tokens=tokens, index=index)


def compressed_attention_on_one_device(draw):
    kind = draw.choice(KINDS)
    rows, seq_len = draw.integer(1, 2), draw.integer(2, 18)
    documents = Documents(draw.rows(rows, seq_len), seq_len)
    mixer = CompressedSparseAttention(WINDOW, kind, scale=DIM**-0.5)
    x = operands(draw, kind, rows, seq_len)
    out = called(draw, mixer, x, batch_metadata(mixer, documents))
    real = decided(x, kind, documents)[..., None, None]
    torch.testing.assert_close(out * real, brute_force(x, kind, documents) * real)


def compressed_attention_across_ranks(draw, mesh, known):
    kind, layout = draw.choice(KINDS), draw.choice((Contiguous, HeadTail))
    rows, seq_len = draw.integer(1, 2), draw.integer(2, 30)
    documents = Documents(draw.rows(rows, seq_len), seq_len)
    mixer = CompressedSparseAttention(WINDOW, kind, scale=DIM**-0.5)
    apply_plan(nn.ModuleList([mixer]), mesh, {"0": CompressedSparseCP()})
    x = operands(draw, kind, rows, seq_len)
    batch = {"input_ids": draw.ids(rows, seq_len)}
    whole = ParallelMesh.from_device_mesh(mesh)
    plan = shard_batch(batch, whole, layout, model=mixer, documents=documents)[1]
    local = {name: v if name in SHARED else plan.shard(v) for name, v in x.items()}
    out = called(draw, mixer, local, plan.attn_metadata)
    real = decided(x, kind, documents)[..., None, None]
    torch.testing.assert_close(plan.gather(out) * real, brute_force(x, kind, documents) * real)


SUBJECTS = (compressed_attention_on_one_device,)


@pytest.mark.parametrize(
    "cases", [range(CASES), pytest.param(range(CASES, MANY), marks=pytest.mark.slow)], ids=len
)
def test_fuzzed_sparse_attention_is_exact_or_refused(cases, capsys):
    tally = run_cases(SUBJECTS, cases)
    with capsys.disabled():
        tally.check()
