"""Gradients of keys that ranks have found apart are as exact as one device's, where asked for."""

from dataclasses import replace

import pytest
import torch
from torch import distributed as dist

from dtcp.distributed.ledger import count_traffic
from dtcp.mixer import batch_metadata
from dtcp.sequence.layout import Contiguous, HeadTail
from dtcp.softmax import AllGatherAttention, HaloAttention, HybridAttention, RingAttention
from dtcp.softmax.mixer import SoftmaxAttention
from dtcp.softmax.moves import AttentionShape
from tests.harness import packings
from tests.harness.attention_parity import (
    BIDIRECTIONAL,
    WINDOW,
    Case,
    local_inputs,
    mixer_on,
    run,
    shard_case,
    truth,
)
from tests.harness.spmd import spmd

WIDE = torch.float32


def on_one_device(case, num_shards):
    """out and gradients of q, k and v in bf16, of one device that has the whole row."""
    mixer, right = SoftmaxAttention(case.mask_case.mask), truth(case, num_shards)
    inputs = [x.detach().to(case.dtype).requires_grad_() for x in right.inputs]
    out = mixer(*inputs, batch_metadata(mixer, case.documents(num_shards)))
    return out, *torch.autograd.grad(out, inputs, right.grad_out.to(case.dtype))


def compared(mesh, style, case, layout):
    """The error of out, dq, dk and dv over one device's; bytes received by all ranks."""
    n, mixer = mesh.size(), mixer_on(mesh, style, case.mask_case.mask)
    sharded, right = shard_case(case, mixer, mesh, layout), truth(case, n)
    with count_traffic() as traffic:
        out, grads = run(case, mixer, sharded, local_inputs(case, sharded))
    ratios = []
    every = zip((out, *grads), on_one_device(case, n), (right.out, *right.grads), strict=True)
    for ours, theirs, exact in every:
        at = sharded.shard(exact.detach())
        error = torch.stack(
            [(x.detach() - at).square().sum() for x in (ours, sharded.shard(theirs))]
        )
        dist.all_reduce(error)
        ratios.append(float((error[0] / error[1]).sqrt()))
    shape = AttentionShape(1, 4, 2, 8, 8, 2)
    moves = style.moves(mixer, sharded.coords, sharded.layout, mesh.get_local_rank(), shape)
    stated = moves.received.forward + moves.received.backward
    assert traffic.received == stated, style
    received = torch.tensor(traffic.received)
    dist.all_reduce(received)
    return ratios, int(received)


@spmd(ranks=(2, 4))
def test_keys_gradients_summed_in_fp32_have_the_error_of_one_device(mesh, ranks):
    """A third more bytes, and half more where keys are kept: gradients go home twice as wide."""
    styles = [
        (AllGatherAttention(), HeadTail, BIDIRECTIONAL),
        (RingAttention(), HeadTail, BIDIRECTIONAL),
    ]
    if ranks == 4:
        styles = [(replace(x, ranks_per_node=2), *of) for x, *of in styles]
    styles.append((HaloAttention(7), Contiguous, WINDOW))
    of = {"seq_len": 64 * ranks, "sink": False, "dtype": torch.bfloat16}
    for style, layout, mask_case in styles:
        case = Case(mask_case, packings.one_document, **of)
        rounded, few = compared(mesh, style, case, layout)
        wide, more = compared(mesh, replace(style, reduce_dtype=WIDE), case, layout)
        assert max(*wide, *rounded[:2]) <= 1.1, f"{wide} and {rounded} with {style}"
        if mask_case is BIDIRECTIONAL:
            assert min(rounded[2:]) > 1.15, f"{rounded} with {style}"
        assert 6 * more == (8 if mask_case is BIDIRECTIONAL else 9) * few


def test_what_cannot_sum_in_fp32_is_refused():
    with pytest.raises(ValueError, match=r"got reduce_dtype=torch.float16: give it None or"):
        RingAttention(reduce_dtype=torch.float16)
    with pytest.raises(ValueError, match=r"with kernel='cudnn': name one of auto, triton, ref"):
        AllGatherAttention(reduce_dtype=WIDE, kernel="cudnn")
    with pytest.raises(ValueError, match=r"RingAttention inside: leave it out, or use RingAtt"):
        HybridAttention(outer=RingAttention(reduce_dtype=WIDE))
