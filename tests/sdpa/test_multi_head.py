"""nn.MultiheadAttention inside a context: over the whole sequence, or refused."""

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Shard, distribute_module, distribute_tensor
from torch.testing import assert_close

from dtcp.sdpa.local_shards import local_shards
from dtcp.sdpa.sequence_layout import sequence_layout
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import HeadTail
from tests.harness.spmd import spmd

SEQ_LEN, WIDTH = 16, 8
LAYOUT, DOCUMENTS = HeadTail(SEQ_LEN, 2), Documents(((5, 11),), SEQ_LEN)
LOCAL_CAUSAL = torch.zeros(SEQ_LEN // 2, SEQ_LEN // 2, dtype=torch.float64)  # only a hint
CALL = {"need_weights": False, "attn_mask": LOCAL_CAUSAL, "is_causal": True}


def built(kdim=None):
    """The same on every rank, its zeroed biases drawn as well."""
    torch.manual_seed(0)
    module = nn.MultiheadAttention(WIDTH, 2, batch_first=True, kdim=kdim, dtype=torch.float64)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def by_hand(module, x, keys):
    """Two heads, dense; only torch's names of the weights are taken over."""
    weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    if module.in_proj_weight is not None:
        weights = module.in_proj_weight.split(WIDTH)
    biases = module.in_proj_bias.split(WIDTH)
    q, k, v = (
        (y @ weight.T + bias).view(*y.shape[:2], 2, -1)
        for y, weight, bias in zip((x, keys, x), weights, biases, strict=True)
    )
    document = DOCUMENTS.document()[0]
    sees = (document[:, None] == document) & torch.ones(SEQ_LEN, SEQ_LEN).tril().bool()
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / (WIDTH / 2) ** 0.5
    share = scores.masked_fill(~sees, -torch.inf).softmax(-1)
    return module.out_proj(torch.einsum("bhij,bjhd->bihd", share, v).flatten(2))


@pytest.mark.parametrize("kdim", [None, 6])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@spmd(ranks=2)
def test_local_shards_reach_into_torchs_function(mesh, compiled, kdim):
    """A mode is off inside a function that it was asked about: ranks saw their own shards."""
    expecting, module = built(kdim), built(kdim)
    x, cotangent = torch.randn(2, 2, SEQ_LEN, WIDTH, dtype=torch.float64)
    keys = x if kdim is None else x[..., :kdim]
    expected = by_hand(expecting, x, keys)
    expected.backward(cotangent)

    own = LAYOUT.token_indices(mesh.get_local_rank())
    run = torch.compile(module, backend="aot_eager", fullgraph=True) if compiled else module
    with local_shards(LAYOUT, mesh, documents=DOCUMENTS):
        out, _ = run(x[:, own], keys[:, own], x[:, own], **CALL)
    assert_close(out, expected[:, own])
    out.backward(cotangent[:, own])
    for mine, theirs in zip(module.parameters(), expecting.parameters(), strict=True):
        torch.distributed.all_reduce(mine.grad)
        assert_close(mine.grad, theirs.grad)


@spmd(ranks=2)
def test_one_row_without_a_dim_for_it_is_a_row(mesh):
    module, x = built(), torch.randn(SEQ_LEN, WIDTH, dtype=torch.float64)
    own = LAYOUT.token_indices(mesh.get_local_rank())
    with local_shards(LAYOUT, mesh, documents=DOCUMENTS):
        out, _ = module(*(x[own],) * 3, **CALL)
    assert_close(out, by_hand(module, x[None], x[None])[0, own])


@spmd(ranks=2)
def test_dtensors_in_a_sequence_layout_reach_into_torchs_function(mesh):
    module, x = built(), torch.randn(1, SEQ_LEN, WIDTH, dtype=torch.float64)
    expected = by_hand(module, x, x)[:, LAYOUT.permutation()]
    shards = distribute_tensor(x[:, LAYOUT.permutation()], mesh, [Shard(1)])
    distribute_module(module, mesh)
    mask = distribute_tensor(torch.zeros(SEQ_LEN, SEQ_LEN, dtype=torch.float64), mesh)
    with sequence_layout(LAYOUT, mesh, documents=DOCUMENTS):
        out, _ = module(shards, shards, shards, **{**CALL, "attn_mask": mask})
    assert_close(out.full_tensor(), expected)


@pytest.mark.parametrize(
    ("options", "call", "message"),
    [
        ({}, {}, r"got need_weights=True: call it with need_weights=False"),
        ({}, {"need_weights": False, "attn_mask": LOCAL_CAUSAL}, "takes no mask as a tensor"),
        (
            {},
            {"need_weights": False, "key_padding_mask": torch.zeros(1, SEQ_LEN // 2).bool()},
            "the tokens that its context knows, got key_padding_mask: leave it out",
        ),
        ({"add_bias_kv": True}, {"need_weights": False}, "got bias_k, bias_v: leave it out"),
        ({"add_zero_attn": True}, {"need_weights": False}, "got add_zero_attn: leave it out"),
        ({"dropout": 0.5}, {"need_weights": False}, "got dropout_p=0.5: set it to 0"),
    ],
)
@spmd(ranks=2)
def test_what_a_sharded_sequence_cannot_have_is_refused(mesh, options, call, message):
    module = nn.MultiheadAttention(WIDTH, 2, batch_first=True, dtype=torch.float64, **options)
    x = torch.randn(1, SEQ_LEN // 2, WIDTH, dtype=torch.float64)
    with local_shards(LAYOUT, mesh), pytest.raises(ValueError, match=message):
        module(x, x, x, **call)


@spmd(ranks=2)
def test_an_encoder_layer_in_evaluation_attends_over_all_shards_compiled_too(mesh):
    """torch has a fused layer for it, which traced code took in spite of the mode."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True, dtype=torch.float64).eval()
    x = torch.randn(1, SEQ_LEN, WIDTH, dtype=torch.float64)
    own = LAYOUT.token_indices(mesh.get_local_rank())
    with torch.no_grad():
        normed = layer.norm1(x + by_hand(layer.self_attn, x, x))
        feed_forward = layer.linear2(layer.linear1(normed).relu())
        expected = layer.norm2(normed + feed_forward)[:, own]
        for run in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
            with local_shards(LAYOUT, mesh, documents=DOCUMENTS):
                out = run(x[:, own], LOCAL_CAUSAL, is_causal=True)
            assert_close(out, expected)
    assert torch.backends.mha.get_fastpath_enabled()
