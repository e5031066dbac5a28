"""Every operand of every mixer is held to its batch: tokens, rows, heads, dtypes, on any ranks."""

import pytest
import torch

from dtcp.batch import shard_batch
from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.huggingface import causal_lm_loss
from dtcp.loss import global_token_count, token_mean_loss
from dtcp.mixer_metadata import batch_metadata
from dtcp.mixer_plan import apply_plan
from dtcp.parallelize import parallelize_hf
from dtcp.recurrent import CausalConv1d, CausalConvCP, GatedDeltaCP, GatedDeltaRule
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import Contiguous
from dtcp.sequence.masks import Bidirectional, Causal
from dtcp.softmax import AllGatherAttention, RingAttention, UlyssesAttention
from dtcp.softmax.mixer import SoftmaxAttention
from dtcp.sparse.mixer import CompressedSparseAttention
from tests.harness.attention_parity import refused
from tests.harness.hf_models import build
from tests.harness.parity import gradients
from tests.harness.spmd import spmd

WHOLE = Documents.single(2, 24)


def heads(tokens, count=2, width=4, rows=2, dtype=torch.float64):
    return torch.randn(rows, tokens, count, width, dtype=dtype)


WRONG = [
    ((heads(24), heads(40), heads(40)), "40 keys where the batch has 24", ValueError),
    ((heads(24), heads(8), heads(8)), "8 keys where the batch has 24", ValueError),
    ((heads(24), heads(24), heads(23)), "of the same tokens and heads", ValueError),
    ((heads(24), heads(24, rows=1), heads(24, rows=1)), "in the rows of the queries", ValueError),
    ((heads(24), heads(24).float(), heads(24)), "one floating dtype, got", TypeError),
    ((heads(24, 3), heads(24), heads(24)), "H a multiple of the G", ValueError),
    ((heads(24, width=6), heads(24), heads(24)), "D the keys' width", ValueError),
    ((heads(24)[:, :, 0], heads(24), heads(24)), "its heads' dim", ValueError),
]


@pytest.mark.parametrize(("inputs", "match", "error"), WRONG)
def test_operands_of_attention_fit_together_on_one_device_A2(inputs, match, error):
    mixer = SoftmaxAttention(Bidirectional())
    metadata = batch_metadata(mixer, WHOLE)
    with pytest.raises(error, match=match):
        mixer(*inputs, metadata)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64, torch.int64])
def test_dtypes_that_nothing_is_summed_in_are_refused(dtype):
    """Of a complex sink, say, only the real part was read."""
    mixer, sparse = SoftmaxAttention(Bidirectional()), CompressedSparseAttention(4, None, scale=1.0)
    metadata, of_sparse = batch_metadata(mixer, WHOLE), batch_metadata(sparse, WHOLE)
    x, y, sink = heads(24), heads(24).to(dtype), torch.zeros(2).to(dtype)
    with pytest.raises(TypeError, match="one floating dtype, got"):
        mixer(y, y, y, metadata)
    with pytest.raises(TypeError, match=f"got sink.dtype={dtype}"):
        mixer(x, x, x, metadata, sink=sink)
    with pytest.raises(TypeError, match="have one floating dtype"):
        sparse(y, y[:, :, 0], of_sparse, sink=torch.zeros(2))
    with pytest.raises(TypeError, match="other operands a floating one"):
        sparse(x, x[:, :, 0], of_sparse, sink=sink)


@pytest.mark.parametrize("style", [RingAttention(), AllGatherAttention(), UlyssesAttention()])
@spmd(ranks=2)
def test_operands_of_attention_fit_together_on_every_rank_A2(mesh, style):
    """Longer keys would be cut, shorter ones read past their end, other dtypes never arrive."""
    mixer = SoftmaxAttention(Bidirectional())
    apply_plan(torch.nn.ModuleList([mixer]), mesh, {"0": style})
    whole = ParallelMesh.from_device_mesh(mesh)
    batch = {"input_ids": torch.zeros(2, 24)}
    metadata = shard_batch(batch, whole, Contiguous, model=mixer)[1].attn_metadata
    q = heads(12)
    for k, v, match, error in (
        (
            heads(20),
            heads(20),
            "keys where the batch has|metadata of its own batch|of the same",
            ValueError,
        ),
        (heads(12), heads(11), "of the same tokens and heads", ValueError),
        (heads(12).float(), heads(12), "one floating dtype", TypeError),
    ):
        refused(match, lambda k=k, v=v: mixer(q, k, v, metadata), error)


@spmd(ranks=2)
def test_operands_of_recurrent_mixers_fit_together_on_every_rank_A2(mesh):
    rule, conv = GatedDeltaRule(), CausalConv1d(3)
    layer = torch.nn.ModuleList([rule, conv])
    apply_plan(layer, mesh, {"0": GatedDeltaCP(), "1": CausalConvCP()})
    whole = ParallelMesh.from_device_mesh(mesh)
    batch = {"input_ids": torch.zeros(2, 24)}
    metadata = shard_batch(batch, whole, Contiguous, model=layer)[1].attn_metadata
    q, g = heads(12), -torch.rand(2, 12, 2, dtype=torch.float64)
    match = "one query, key, value and beta per token"
    for k, v, beta in ((heads(11), q, g), (q, heads(12, 3), g[:, :, :1]), (q, q, g[:, :11])):
        grow = -torch.rand(v.shape[:3], dtype=torch.float64)
        refused(match, lambda k=k, v=v, g=grow, b=beta: rule(q, k, v, g, b, metadata))
    x = torch.randn(2, 12, 4)
    refused("so many taps per channel", lambda: conv(x, torch.randn(4, 4), metadata))
    refused("so many taps per channel", lambda: conv(x, torch.randn(3, 3), metadata))
    taps = torch.randn(4, 3)
    match = r"adds one number to each channel, got bias.shape=\(3,\)"
    refused(match, lambda: conv(x, taps, metadata, bias=torch.zeros(3)))


@spmd(ranks=2)
def test_a_batch_without_a_valid_token_has_zero_loss_and_gradients_A4(mesh):
    """Divided by the count of 0, both would be NaN."""
    logits = torch.randn(2, 6, 9, dtype=torch.float64, requires_grad=True)
    labels = torch.full((2, 6), -100)
    loss = token_mean_loss(logits, labels, global_token_count(labels, mesh))
    loss.backward()
    assert loss == 0 and not logits.grad.any()
    assert token_mean_loss(logits, labels, 0) == 0
    # One rank without a token has no share; the other's is the mean.
    labels[:, 0] = 3 if mesh.get_local_rank() else -100
    count = global_token_count(labels, mesh)
    share = token_mean_loss(logits, labels, count)
    assert count == 2 and (share > 0) == bool(mesh.get_local_rank())


@spmd(ranks=2)
def test_a_batch_of_transformers_without_a_valid_label_has_zero_loss_and_gradients_A4(mesh):
    mesh = ParallelMesh.from_degrees(Degrees(cp=2), "cpu")
    model = parallelize_hf(build("llama"), mesh)
    ids = torch.randint(1, 64, (2, 16))
    batch = {"input_ids": ids, "labels": torch.full_like(ids, -100)}
    loss = causal_lm_loss(model, batch, mesh)
    loss.backward()
    assert loss == 0 and not any(bool(grad.any()) for grad in gradients(model).values())


def test_masks_of_causal_models_are_still_answered():
    mixer = SoftmaxAttention(Causal())
    q = heads(24)
    assert mixer(q, q, q, batch_metadata(mixer, WHOLE)).isfinite().all()
