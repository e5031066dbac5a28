"""The seed's functions: a stranger's model, sharded, against the same model on one device."""

import contextlib
from functools import partial

import pytest
import torch
from torch import distributed as dist
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.attention.varlen import varlen_attn
from torch.testing import assert_close
from torch.utils.checkpoint import CheckpointError, checkpoint

from dtcp.compile import count_graphs
from dtcp.cp_utils import (
    BatchSharder,
    _build_position_ids,
    attach_context_parallel_hooks,
    attach_cp_sdpa_hooks,
    create_context_parallel_ctx,
    get_train_context,
    make_cp_batch_and_ctx,
)
from dtcp.distributed.ledger import count_traffic
from dtcp.loss import global_token_count, token_mean_loss
from dtcp.rows import TokenField
from dtcp.sdpa.frozen import FrozenTarget
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import Contiguous, HeadTail
from tests.harness import hf_models, reference
from tests.harness.plain_sdpa_model import VOCAB, Attention, Decoder
from tests.harness.spmd import spmd

SEQ_LEN = 21
PACKED, PADDED = ((9, 12), (4, 10, 7)), ((21,), (13,))
compiled_or_not = pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])


def batch_of(lengths, seq_len=SEQ_LEN):
    """Ids, labels of next tokens (already shifted), and what says where documents end."""
    documents = Documents(lengths, seq_len)
    ids = torch.randint(1, VOCAB, (len(lengths), seq_len))
    real = documents.document() >= 0
    labels = torch.randint(0, VOCAB, ids.shape).masked_fill(~real, -100)
    batch = {"input_ids": ids, "labels": labels}
    if bool(real.all()):
        batch["position_ids"] = documents.position_ids()
    else:
        batch["attention_mask"] = real.long()
    return batch


def dense_mask(lengths, seq_len=SEQ_LEN):
    """Who sees whom by the reference; padding sees itself, for a row of nothing is NaN."""
    seen = reference.visible(lengths, seq_len, reference.causal)
    return (seen | torch.eye(seq_len, dtype=torch.bool))[:, None]


def on_one_device(model, batch, lengths):
    position_ids = Documents(lengths, SEQ_LEN).position_ids()
    model.zero_grad()
    logits = model(batch["input_ids"], position_ids, dense_mask(lengths))
    loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}


def on_mesh(model, mesh, batch, *, run=None, keep_open=False, **options):
    """Loss and gradients of all ranks together; backward outside the context unless kept open."""
    model.zero_grad()
    context, local = make_cp_batch_and_ctx(mesh, batch, **options)
    tokens = global_token_count(local["labels"], mesh)
    with context():
        logits = (run or model)(local["input_ids"], local.get("position_ids"))
        loss = token_mean_loss(logits, local["labels"], tokens)
        if keep_open:
            loss.backward()
    if not keep_open:
        loss.backward()
    loss = loss.detach()
    dist.all_reduce(loss)
    for p in model.parameters():
        dist.all_reduce(p.grad)
    return loss, {n: p.grad.clone() for n, p in model.named_parameters()}


def with_positions(batch):
    return {**batch, "position_ids": batch.get("position_ids", torch.arange(SEQ_LEN)[None])}


def hooked(mesh, hooks_last):
    """A model with the seed's hooks, attached in either order, and its plain twin."""
    model, plain = Decoder(own_mask=True), Decoder()
    plain.load_state_dict(model.state_dict())
    attach = [
        lambda: attach_context_parallel_hooks(model),
        lambda: attach_cp_sdpa_hooks(model, mesh),
    ]
    for hook in attach[:: -1 if hooks_last else 1]:
        hook()
    return model, plain


def assert_steps_equal(model, plain, mesh, rows):
    """Loss and every gradient of a batch of each; no patch, nothing left."""
    before = F.scaled_dot_product_attention
    for lengths in rows:
        batch = with_positions(batch_of(lengths))
        actual = on_mesh(model, mesh, batch)
        assert F.scaled_dot_product_attention is before
        assert_close(actual, on_one_device(plain, batch, lengths))


@spmd(ranks=(1, 2, 3, 4))
def test_step_on_ranks_equals_step_on_one(mesh, ranks):
    model, plain = hooked(mesh, hooks_last=True)
    assert_steps_equal(model, plain, mesh, (PACKED, PADDED, PACKED))


@pytest.mark.parametrize("lengths", [PACKED, PADDED], ids=["packed", "padded"])
@spmd(ranks=(1, 3))
def test_compiled_step_on_ranks_equals_step_on_one(mesh, ranks, lengths):
    """Two batches, one graph a layer. Layers share their code, but their parameters' versions
    do not split it."""
    model, plain = hooked(mesh, hooks_last=False)
    for layer in model.layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    with count_graphs() as graphs:
        assert_steps_equal(model, plain, mesh, (lengths, lengths))
    assert 0 < graphs.graphs <= 2 and graphs.breaks == 0


@spmd(ranks=2)
def test_masks_of_a_models_own_are_replaced_where_they_say_causal(mesh):
    """The mask of a shard's positions has jumps in it; what it means is causal in documents."""
    model = Decoder(own_mask=True)
    plain = Decoder()
    plain.load_state_dict(model.state_dict())
    batch = batch_of(PACKED)
    with pytest.raises(ValueError, match="takes no mask as a tensor"):
        on_mesh(model, mesh, batch)
    attach_context_parallel_hooks(model)
    attach_context_parallel_hooks(model)
    for compiled in (False, True):
        if compiled:
            for layer in model.layers:
                layer.compile(backend="aot_eager", fullgraph=True)
        assert_close(on_mesh(model, mesh, batch), on_one_device(plain, batch, PACKED))


def test_frequencies_by_the_longest_position_of_a_shard_are_refused():
    ntk = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    with pytest.raises(ValueError, match=r"rotary_emb with rope_type='dynamic'.*parallelize_hf"):
        attach_context_parallel_hooks(hf_models.build("llama", rope_parameters=ntk))


@compiled_or_not
@spmd(ranks=2)
def test_masks_that_say_more_are_refused(mesh, compiled):
    model = Decoder()
    attach_context_parallel_hooks(model)
    layer = model.layers[0]
    run = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
    context, local = make_cp_batch_and_ctx(mesh, batch_of(PACKED))
    length = local["input_ids"].shape[1]
    x = torch.randn(2, length, 16, dtype=torch.float64)
    causal = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    window = causal & ~causal.tril(-3)
    added = torch.zeros(causal.shape, dtype=torch.float64).masked_fill(
        ~causal, torch.finfo(torch.float64).min
    )
    with context():
        want = layer(x, None)
        assert_close(run(x, causal), want)
        assert_close(run(x, added), want)
        kinds = RuntimeError if compiled else ValueError
        for wrong in (window, ~causal, added - causal.double()):
            with pytest.raises(kinds, match=r"says more|does not say"):
                run(x, wrong)


@pytest.mark.parametrize("style", ["allgather", "alltoall", None])
@spmd(ranks=(1, 2, 3))
def test_context_shards_buffers_and_gives_them_back(mesh, ranks, style):
    """Attention inside is over all; backward outside; entered twice."""
    n = ranks
    whole = torch.randn(2, 12, 4, 8, dtype=torch.float64)
    x, kept, ids = whole.clone(), whole.clone(), torch.arange(12)[None].clone()
    ctx = create_context_parallel_ctx(mesh, [x, kept, ids], [1, 1, 1], {kept}, style)
    layout = HeadTail(12, n)
    rank = mesh.get_local_rank()
    q = whole.transpose(1, 2).clone().requires_grad_()
    want = F.scaled_dot_product_attention(q, q, q, is_causal=True)
    (want_grad,) = torch.autograd.grad(want.square().sum(), q)
    for _ in range(2):
        with get_train_context(False, False, ctx)():
            for buffer in (x, kept):
                assert_close(buffer, layout.shard(whole, rank))
            assert_close(ids[0], layout.token_indices(rank))
            mine = x.transpose(1, 2).clone().requires_grad_()
            out = F.scaled_dot_product_attention(mine, mine, mine, is_causal=True)
        (grad,) = torch.autograd.grad(out.square().sum(), mine)
        assert_close(out, layout.shard(want, rank, dim=2))
        assert_close(grad, layout.shard(want_grad, rank, dim=2))
        assert_close(x, whole)
        assert_close(kept, layout.shard(whole, rank))
    if n > 1:
        with count_traffic() as traffic:
            F.scaled_dot_product_attention(mine, mine, mine)
        assert traffic.calls == 0


@spmd(ranks=2)
def test_context_refuses_what_it_cannot_shard(mesh):
    x, y = torch.zeros(2, 8), torch.zeros(2, 4)
    for match, buffers, dims, kept, method in (
        ("'addtoall': use one", [x], [1], set(), "addtoall"),
        ("1 buffers and 2 dims", [x], [1, 1], set(), None),
        (r"lengths=\[8, 4\]", [x, y], [1, 1], set(), None),
        ("among the buffers", [x], [1], {y}, None),
        ("multiple of 4", [torch.zeros(2, 6)], [1], set(), None),
        ("requires grad", [torch.zeros(2, 8, requires_grad=True)], [1], set(), None),
    ):
        with pytest.raises(ValueError, match=match):
            create_context_parallel_ctx(mesh, buffers, dims, kept, method)


@compiled_or_not
@spmd(ranks=2)
def test_flex_attention_in_the_context_is_refused(mesh, compiled):
    """It would see the shard alone, and nobody would notice."""
    attend = torch.compile(flex_attention, backend="aot_eager") if compiled else flex_attention
    x = torch.randn(1, 2, 32, 16)
    in_context = create_context_parallel_ctx(mesh, [x], [2], set())
    error = pytest.raises(Exception, match="got flex_attention, which would see this rank's")
    with in_context, error:
        attend(x, x, x)
    assert attend(x, x, x).shape == x.shape


@compiled_or_not
@spmd(ranks=2)
def test_attention_of_varlen_kernels_in_the_context_is_refused(mesh, compiled):
    attend = torch.compile(varlen_attn, backend="aot_eager") if compiled else varlen_attn
    x, bounds = torch.randn(8, 2, 16), torch.tensor([0, 8], dtype=torch.int32)
    error = pytest.raises(Exception, match=r"got torch_attn\._varlen_attn, which would see")
    with create_context_parallel_ctx(mesh, [torch.zeros(1, 16)], [1], set()), error:
        attend(x, x, x, bounds, bounds, 8, 8)


OPS_BY_NAME = {
    "packet": torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
    "overload": torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    "function": torch._scaled_dot_product_attention_math,
    "composite": torch.ops.aten.scaled_dot_product_attention,
}


# Dynamo (2.13) asks no mode about the function under torch itself.
@pytest.mark.parametrize(
    ("form", "compiled"),
    [(form, c) for form in OPS_BY_NAME for c in (False, True) if (form, c) != ("function", True)],
)
@spmd(ranks=2)
def test_ops_of_attention_called_by_name_in_the_context_are_refused(mesh, form, compiled):
    def call(x):
        return OPS_BY_NAME[form](x, x, x)

    attend = torch.compile(call, backend="aot_eager") if compiled else call
    x = torch.randn(1, 2, 16, 8)
    error = pytest.raises(Exception, match=r"got _?scaled_dot_product_\w+(.default)?, which would")
    with create_context_parallel_ctx(mesh, [torch.zeros(1, 16)], [1], set()), error:
        attend(x)
    attend(x)


@spmd(ranks=(2, 3))
def test_batch_comes_back_padded_and_consistent(mesh, ranks):
    """Whole again, every key is what it was, and padding what it should be."""
    batch = batch_of(PADDED)
    before = {key: x.clone() for key, x in batch.items()}
    batch["meta"], batch["pixels"] = "kept", torch.ones(3, 5)
    loss_mask = torch.rand(2, SEQ_LEN)
    _, local = make_cp_batch_and_ctx(mesh, batch, loss_mask, padding_token_id=7)
    assert all(torch.equal(batch[key], x) for key, x in before.items())
    assert local["meta"] == "kept" and local["pixels"] is batch["pixels"]
    assert "attention_mask" not in local
    padded = -(-SEQ_LEN // (2 * ranks)) * 2 * ranks
    layout, extra = HeadTail(padded, ranks), padded - SEQ_LEN
    real = torch.tensor([[t < n for t in range(padded)] for n in (21, 13)])
    want = {
        "input_ids": F.pad(before["input_ids"], (0, extra), value=7),
        "labels": F.pad(before["labels"], (0, extra), value=-100),
        "position_ids": torch.arange(padded).expand(2, -1),
        "padding_mask": ~real,
        "loss_mask": F.pad(loss_mask, (0, extra)),
    }
    for key, whole in want.items():
        assert_close(local[key], layout.shard(whole, mesh.get_local_rank()))
        assert local[key].is_contiguous()


@pytest.mark.parametrize("rows", [PACKED, PADDED], ids=["packed", "padded"])
@spmd(ranks=2)
def test_model_of_transformers_trains_in_the_context_and_is_read(mesh, rows):
    """Unmodified but for the hooks; as a frozen target too, which has nothing else to do."""
    model = hf_models.build("llama")
    model.set_attn_implementation("sdpa")
    plain = hf_models.build("llama")
    attach_context_parallel_hooks(model)
    attach_cp_sdpa_hooks(model, mesh)
    batch = with_positions(batch_of(rows))
    mask = torch.zeros(2, 1, SEQ_LEN, SEQ_LEN, dtype=torch.float64)
    mask.masked_fill_(~dense_mask(rows), torch.finfo(torch.float64).min)
    position_ids = Documents(rows, SEQ_LEN).position_ids()
    logits = plain(batch["input_ids"], attention_mask=mask, position_ids=position_ids).logits
    expected = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
    expected.backward()

    def run(ids, position_ids):
        return model(ids, position_ids=position_ids, use_cache=False).logits

    loss, grads = on_mesh(model, mesh, batch, run=run)
    assert_close(loss, expected.detach(), rtol=1e-5, atol=0.0)
    for name, p in plain.named_parameters():
        assert (grads[name] - p.grad).abs().max() <= 1e-5 * p.grad.abs().max(), name
    if rows == PACKED:
        read = FrozenTarget(model, mesh, capture=["model.layers.0"])(
            batch["input_ids"], position_ids, use_cache=False
        )
        assert_close(read.logits, logits.detach(), rtol=1e-5, atol=1e-6)


@spmd(ranks=2)
def test_embeddings_and_positions_of_several_axes_are_sharded(mesh):
    """Gradients reach the embeddings: each rank those of its own tokens."""
    embeds = torch.randn(2, 8, 16, dtype=torch.float64, requires_grad=True)
    position_ids = torch.arange(8).expand(3, 2, -1).contiguous()
    batch = {
        "inputs_embeds": embeds,
        "labels": torch.ones(2, 8).long(),
        "position_ids": position_ids,
    }
    _, local = make_cp_batch_and_ctx(mesh, batch)
    mine = HeadTail(8, 2).token_indices(mesh.get_local_rank())
    assert_close(local["position_ids"], position_ids[:, :, mine])
    local["inputs_embeds"].sum().backward()
    assert_close(embeds.grad.sum((0, 2)), torch.zeros(8).double().index_fill(0, mine, 32))


@spmd(ranks=1)
def test_one_rank_has_nothing_done_to_it(mesh):
    batch = {"input_ids": torch.ones(1, 5).long(), "_cp_make_batch_fn": None}
    for where in (mesh, None):
        context, same = make_cp_batch_and_ctx(where, batch)
        assert same["input_ids"] is batch["input_ids"] and list(same) == ["input_ids"]
        with context():
            pass
    model = Decoder()
    attach_cp_sdpa_hooks(model, mesh)
    assert type(model.layers[0].self_attn) is Attention


@spmd(ranks=2)
def test_sharder_of_the_models_own_comes_first(mesh):
    batch = batch_of(PACKED)
    sharder = BatchSharder(Contiguous, fields={"weights": TokenField(1, 0.0)})
    weights = torch.rand(2, SEQ_LEN)
    batch |= {"_cp_make_batch_fn": sharder, "weights": weights}
    _, local = make_cp_batch_and_ctx(mesh, batch, use_te=True)
    layout = Contiguous(22, 2)
    assert_close(local["weights"], layout.shard(F.pad(weights, (0, 1)), mesh.get_local_rank()))
    seen = {}

    def own(cp_mesh, tp_mesh, batch, *, loss_mask, padding_token_id):
        seen.update(cp_mesh=cp_mesh, tp_mesh=tp_mesh, pad=padding_token_id)
        return "context", batch

    assert make_cp_batch_and_ctx(mesh, {"_cp_make_batch_fn": own}, padding_token_id=3)[1] == {}
    assert seen == {"cp_mesh": mesh, "tp_mesh": None, "pad": 3}


@spmd(ranks=2)
def test_bad_batches_are_refused(mesh):
    good = batch_of(PACKED)
    ids, labels, position_ids = good["input_ids"], good["labels"], good["position_ids"]
    left = torch.ones(2, SEQ_LEN).long()
    left[1, :3] = 0
    plain = {"input_ids": ids, "labels": labels}
    window = dense_mask(PADDED).tril() & ~dense_mask(PADDED).tril(-4)
    for match, batch in (
        ("got neither", {"labels": labels}),
        ("inputs_embeds'", {**plain, "inputs_embeds": torch.zeros(2, SEQ_LEN, 4)}),
        ("padded on the right", {**plain, "attention_mask": left}),
        ("padded on the right", {**plain, "padding_mask": left == 0}),
        ("other than 0 and 1", {**plain, "attention_mask": left + 1}),
        ("see just what came before", {**plain, "attention_mask": window}),
        ("adds other than 0", {**plain, "attention_mask": torch.rand(2, 1, SEQ_LEN, SEQ_LEN)}),
        ("no such mask", {**plain, "attention_mask": left[:, :5]}),
        ("Position ids count up", {**plain, "position_ids": position_ids + 1}),
        ("key='weights'", {**plain, "weights": torch.zeros(2, SEQ_LEN)}),
        ("rows of one length", {**plain, "labels": labels[:, 1:]}),
        ("Position ids go with tokens", {**plain, "position_ids": position_ids[0]}),
        ("where they are read", {**plain, "position_ids": position_ids.expand(3, -1, -1)}),
        ("where they are read", {**plain, "cu_seqlens": torch.tensor([0, 4])}),
        ("in a row of their own", {**plain, "seq_lens": torch.tensor([4, 2])}),
    ):
        with pytest.raises(ValueError, match=match):
            make_cp_batch_and_ctx(mesh, batch)
    with pytest.raises(KeyError, match="labels"):
        make_cp_batch_and_ctx(mesh, {"input_ids": ids})


@spmd(ranks=2)
def test_dense_mask_of_documents_is_understood(mesh):
    """Bool, or added to scores: padding and documents are read off it."""
    lengths = ((9, 12), (4, 6))
    model = Decoder()
    batch = batch_of(lengths)
    mask = dense_mask(lengths) & (Documents(lengths, SEQ_LEN).document() >= 0)[:, None, None]
    added = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    batch["position_ids"] = Documents(lengths, SEQ_LEN).position_ids()
    expected = on_one_device(model, batch, lengths)
    for attention_mask in (mask, added):
        assert_close(on_mesh(model, mesh, {**batch, "attention_mask": attention_mask}), expected)


@spmd(ranks=(2, 3))
def test_lengths_of_documents_are_heeded(mesh, ranks):
    """Each document by itself, with the padding behind it in its slot apart."""
    model, parts = Decoder(), ((6, 3, 10, 2), (17, 4))
    seen = reference.visible(parts, SEQ_LEN, reference.causal)[:, None]
    ids = torch.randint(1, VOCAB, (2, SEQ_LEN))
    real = torch.cat(
        [torch.arange(n) < 99 * (1 - i % 2) for i, n in enumerate(parts[0] + parts[1])]
    )
    labels = ids.roll(1).masked_fill(~real.view(2, SEQ_LEN), -100)
    logits = model(ids, Documents(((9, 12), (21,)), SEQ_LEN).position_ids(), seen)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    expected.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    lengths = {
        "seq_lens": torch.tensor([[6, 10], [17, -7]]),
        "seq_lens_padded": torch.tensor([[9, 12], [21, -7]]),
    }
    batch = {"input_ids": ids, "labels": labels, **lengths}
    actual = on_mesh(model, mesh, batch, seq_lens_padding_value=-7)
    assert_close(actual, (expected.detach(), grads))
    _, local = make_cp_batch_and_ctx(mesh, batch, seq_lens_padding_value=-7)
    assert bool(((local["labels"] == -100) >= local["padding_mask"]).all())
    for key, value in (("seq_lens", torch.tensor([[22], [5]])), ("attention_mask", ids > 0)):
        with pytest.raises(ValueError, match=r"fit their slots|says once what is padding"):
            make_cp_batch_and_ctx(mesh, {**batch, key: value}, seq_lens_padding_value=-7)


@compiled_or_not
@spmd(ranks=2)
def test_claimed_module_outside_its_context_raises(mesh, compiled):
    """So does one that does without torch's attention; none attends to its shard alone.

    Hooks after the first compiled call are seen.
    """
    model = Decoder()
    run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    run(torch.ones(1, 4).long(), torch.arange(4)[None])
    attach_cp_sdpa_hooks(model, mesh)
    attach_cp_sdpa_hooks(model, mesh)
    batch = batch_of(PACKED)
    context, local = make_cp_batch_and_ctx(mesh, batch)
    for inside in (False, True, False):
        with contextlib.ExitStack() as stack:
            if inside:
                stack.enter_context(context())
            else:
                says = r"runs inside the context|Observed exception"
                stack.enter_context(pytest.raises(Exception, match=says))
            run(local["input_ids"], local["position_ids"])
    if not compiled:

        class Eager(Attention):
            def forward(self, x, attention_mask=None):
                return self.o(self.q(x))

        model.layers[1].self_attn = Eager().double()
        attach_cp_sdpa_hooks(model, mesh)
        with context(), pytest.raises(ValueError, match=r"got layers.1.self_attn without a call"):
            model(local["input_ids"], local["position_ids"])


def checkpointed(model, *, compiled, **options):
    """Checkpoints around layers, compiled or not, that recompute in the backward pass."""
    for layer in model.layers:
        forward = layer.forward
        if compiled:
            forward = torch.compile(forward, backend="aot_eager", fullgraph=True)
        layer.forward = partial(checkpoint, forward, **options)


@pytest.mark.parametrize(
    ("claimed", "compiled"), [(False, False), (True, True)], ids=["free-eager", "claimed-compiled"]
)
@spmd(ranks=2)
def test_reentrant_checkpoint_recomputes_inside_the_context(mesh, claimed, compiled):
    """Wherever backward is called, in one checkpoint or in another; nothing stays open."""
    model, plain = Decoder(), Decoder()
    plain.load_state_dict(model.state_dict())
    if claimed:
        attach_cp_sdpa_hooks(model, mesh)
    checkpointed(model, compiled=compiled, use_reentrant=True)
    # Ends with a checkpoint: no op inside the context reads what the last layer gives.
    decode, model.head = model.head, torch.nn.Identity()
    for nested in (False, True):
        if nested:
            layer = model.layers[1]
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=True)
        batch = batch_of(PACKED)
        expected = on_one_device(plain, batch, PACKED)
        model.zero_grad()
        decode.zero_grad()
        context, local = make_cp_batch_and_ctx(mesh, batch)
        with context():
            hidden = model(local["input_ids"], local["position_ids"])
        labels = local["labels"]
        loss = token_mean_loss(decode(hidden), labels, global_token_count(labels, mesh))
        loss.backward()
        gradients = {
            n: p.grad for n, p in [*model.named_parameters(), *decode.named_parameters("head")]
        }
        for grad in gradients.values():
            dist.all_reduce(grad)
        assert_close({name: gradients[name] for name in expected[1]}, expected[1])


@pytest.mark.parametrize(
    ("claimed", "compiled"), [(True, False), (False, True)], ids=["claimed-eager", "free-compiled"]
)
@spmd(ranks=2)
def test_checkpoint_recomputes_inside_the_context_or_raises(mesh, claimed, compiled):
    model, plain = Decoder(), Decoder()
    plain.load_state_dict(model.state_dict())
    if claimed:
        attach_cp_sdpa_hooks(model, mesh)
    batch = batch_of(PACKED)
    # Unchecked, for the count of what is kept differs too.
    checkpointed(model, compiled=compiled, use_reentrant=False, determinism_check="none")
    actual = on_mesh(model, mesh, batch, keep_open=True)
    assert_close(actual, on_one_device(plain, batch, PACKED))
    refused = (CheckpointError, ValueError, RuntimeError)
    with pytest.raises(refused, match=r"different number of tensors|runs inside|Observed excep"):
        on_mesh(model, mesh, batch)


class Again(torch.autograd.Function):
    """A checkpoint of somebody's own, that calls forward again by a name of its own."""

    @staticmethod
    def forward(ctx, layer, x):
        return layer(x, None)


@spmd(ranks=2)
def test_attention_that_nobody_could_recompute_is_refused(mesh):
    model = Decoder()
    context, local = make_cp_batch_and_ctx(mesh, batch_of(PACKED))
    x = torch.randn(2, local["input_ids"].shape[1], 16, dtype=torch.float64, requires_grad=True)
    with context():
        with torch.no_grad():
            model.layers[0](x, None)
        with pytest.raises(ValueError, match="not known to open it"):
            Again.apply(model.layers[0], x)


@spmd(axes={"dp_shard": 2, "cp": 2})
def test_axis_is_found_by_name(mesh):
    batch = batch_of(PACKED)
    _, local = make_cp_batch_and_ctx(mesh, batch)
    ids = F.pad(batch["input_ids"], (0, 3))
    assert_close(local["input_ids"], HeadTail(24, 2).shard(ids, mesh["cp"].get_local_rank()))


def test_windows_and_modules_without_is_causal_are_refused():
    model = Decoder()
    model.layers[1].self_attn.sliding_window = 4
    with pytest.raises(ValueError, match=r"layers.1.self_attn with sliding_window=4"):
        attach_context_parallel_hooks(model)

    class Bare(Attention):
        def forward(self, x, attention_mask=None):
            return x

    model.layers[1].self_attn = Bare()
    with pytest.raises(ValueError, match="whose forward has no such argument"):
        attach_context_parallel_hooks(model)
    with pytest.raises(ValueError, match="modules named self_attn"):
        attach_context_parallel_hooks(torch.nn.Linear(1, 1))


def test_hooked_module_outside_a_context_runs_as_it_did():
    model, ids = Decoder(own_mask=True), torch.ones(2, 9).long()
    position_ids = Documents(((4, 5), (9,)), 9).position_ids()
    before = model(ids, position_ids)
    attach_context_parallel_hooks(model)
    assert_close(model(ids, position_ids), before)


def test_position_ids_are_built_only_where_missing():
    batch = {"input_ids": torch.zeros(2, 3)}
    assert _build_position_ids(batch, "cpu") is batch
    assert torch.equal(batch["position_ids"], torch.arange(3)[None])
    present = {"input_ids": torch.zeros(2, 3), "position_ids": torch.ones(2, 3)}
    assert torch.equal(_build_position_ids(present, "cpu")["position_ids"], torch.ones(2, 3))
    with pytest.raises(KeyError, match="input_ids"):
        _build_position_ids({}, "cpu")


def test_train_context_opens_what_is_asked_and_closes_it():
    from torch._dynamo import compiled_autograd

    factory = get_train_context(True, True)
    for _ in range(2):
        with factory():
            assert compiled_autograd.compiled_autograd_enabled
        assert not compiled_autograd.compiled_autograd_enabled
