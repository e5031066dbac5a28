"""What users of other libraries met, wrong without a word: each is exact here, or refused."""

from itertools import accumulate, pairwise
from unittest import mock

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn import functional as F
from torch.nn.functional import scaled_dot_product_attention as captured
from torch.testing import assert_close

from dtcp.batch import shard_batch
from dtcp.compile import EagerIsland, InGraph
from dtcp.distributed.mesh import ParallelMesh
from dtcp.labels import IGNORED, shift_labels
from dtcp.loss import global_token_count, token_mean_loss
from dtcp.mixer_metadata import batch_metadata
from dtcp.mixer_plan import apply_plan
from dtcp.sdpa.aten_rules import install_sdpa_rules
from dtcp.sdpa.sequence_layout import sequence_layout
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import Contiguous, HeadTail
from dtcp.sequence.masks import Causal
from dtcp.softmax import AllGatherAttention, HybridAttention, RingAttention, UlyssesAttention
from dtcp.softmax.mixer import SoftmaxAttention
from tests.harness import packings, reference
from tests.harness.attention_parity import (
    CAUSAL,
    LAYOUTS,
    WINDOW,
    Block,
    Case,
    assert_equals_one_device,
    errors,
    in_tiles,
    local_inputs,
    mixer_on,
    run,
    shard_case,
    styles,
    truth,
)
from tests.harness.spmd import spmd

SEQ_LEN, HEADS, DIM = 32, 4, 8


def sharded_qkv(mesh):
    """q, k, v as torch's attention takes them, the sequence sharded."""
    shape = (2, HEADS, SEQ_LEN, DIM)
    return [distribute_tensor(torch.randn(shape), mesh, [Shard(2)]) for _ in range(3)]


boundaries = pytest.mark.parametrize("boundary", [InGraph(), EagerIsland()])


@spmd(ranks=2)
def test_mask_as_a_tensor_is_refused(mesh):
    """transformers hands one over where it cannot say is_causal."""
    install_sdpa_rules()
    q, k, v = sharded_qkv(mesh)
    mask = torch.ones(SEQ_LEN, SEQ_LEN, dtype=torch.bool).tril()
    with pytest.raises((ValueError, RuntimeError), match=r"mask as a tensor|mixed torch\.Tensor"):
        captured(q, k, v, attn_mask=mask)
    inside = sequence_layout(HeadTail(SEQ_LEN, 2), mesh)
    with inside, pytest.raises(ValueError, match="takes no mask as a tensor"):
        captured(q, k, v, attn_mask=mask)


@spmd(ranks=4)
def test_backward_reads_the_keys_of_its_own_step_and_batch(mesh):
    """diffusers 14265: the ring's backward used the keys of step 0 for all.

    Here with two batches in flight, the first one's backward last, and twice.
    """
    for style in styles(4):
        mixer = mixer_on(mesh, style, WINDOW.mask)
        flying = []
        for packing in (packings.across_borders, packings.equal_rows):
            case = Case(WINDOW, packing)
            sharded = shard_case(case, mixer, mesh, HeadTail)
            q, k, v, sink = inputs = local_inputs(case, sharded)
            flying.append((case, sharded, inputs, mixer(q, k, v, sharded.attn_metadata, sink=sink)))
        for case, sharded, inputs, out in (*flying[::-1], flying[0]):
            grad_out = sharded.shard(truth(case, 4).grad_out)
            grads = torch.autograd.grad(out, inputs, grad_out, retain_graph=True)
            result = type(run(case, mixer, sharded, inputs))(out.detach(), grads)
            assert max(errors(case, result, sharded).values()) <= 1e-12


@spmd(ranks=4)
def test_partial_results_are_held_in_fp32(mesh):
    """ring-flash-attention 42: bf16 partial results are catastrophic in backward; a ring of
    four shards must be as exact as one exchange for all."""
    case = Case(CAUSAL, packings.one_document, dtype=torch.bfloat16, sink=False, seq_len=128)
    by_style = {}
    for style in (RingAttention(), AllGatherAttention()):
        mixer = mixer_on(mesh, in_tiles(style, 8), CAUSAL.mask)
        sharded = shard_case(case, mixer, mesh, HeadTail)
        result = run(case, mixer, sharded, local_inputs(case, sharded))
        by_style[type(style)] = errors(case, result, sharded)
    for name, error in by_style[RingAttention].items():
        assert error <= 1.1 * by_style[AllGatherAttention][name]


class TinyLM(nn.Module):
    """Embedding, attention, head: enough to have a loss."""

    def __init__(self, vocab=16):
        super().__init__()
        self.embed = nn.Embedding(vocab, HEADS * DIM, dtype=torch.float64)
        self.mixer = SoftmaxAttention(Causal())
        self.head = nn.Linear(HEADS * DIM, vocab, dtype=torch.float64)

    def forward(self, input_ids, position_ids, attn_metadata):
        x = self.embed(input_ids) + position_ids[..., None].double().sin()
        x = x.unflatten(2, (HEADS, DIM))
        return self.head(self.mixer(x, x, x, attn_metadata).flatten(2))


UNEVEN = ((3, 20, 1, 9), (30,))
"""Documents of two rows of 34 tokens; 4 ranks pad them to 40, and have unequal shares of labels."""


def one_device_step(model, input_ids, documents):
    """(loss, gradients) by torch's own cross-entropy, document by document, on the whole."""
    labels = torch.full_like(input_ids, IGNORED)
    for row, lengths in enumerate(documents.lengths):
        for start, stop in pairwise([0, *accumulate(lengths)]):
            labels[row, start : stop - 1] = input_ids[row, start + 1 : stop]
    logits = model(input_ids, documents.position_ids(), batch_metadata(model, documents))
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    return loss.detach(), torch.autograd.grad(loss, list(model.parameters()))


def mesh_step(model, input_ids, documents, mesh, layout):
    """The same on ranks: local batch, global token count, gradients summed."""
    batch = {
        "input_ids": input_ids,
        "labels": shift_labels(input_ids, documents),
        "position_ids": documents.position_ids(),
    }
    whole = ParallelMesh.from_device_mesh(mesh)
    local, sharded = shard_batch(batch, whole, layout, model=model, documents=documents)
    tokens = global_token_count(local["labels"], mesh)
    logits = model(local["input_ids"], local["position_ids"], sharded.attn_metadata)
    share = token_mean_loss(logits, local["labels"], tokens)
    grads = torch.autograd.grad(share, list(model.parameters()))
    for x in (loss := share.detach(), *grads):
        dist.all_reduce(x)
    return loss, grads, local


@pytest.mark.parametrize("layout", [Contiguous, HeadTail])
@spmd(ranks=(2, 4))
def test_labels_and_loss_at_shard_borders(mesh, layout, ranks):
    """DeepSpeed 8457: the label at a border was lost, and ranks with unequal numbers of valid
    tokens counted alike. Megatron 673 and transformers 46775: the loss times cp_size."""
    documents = Documents(UNEVEN, 34)
    model = TinyLM()
    input_ids = torch.randint(16, (2, 34))
    loss, grads = one_device_step(model, input_ids, documents)
    apply_plan(model, mesh, {"mixer": RingAttention()})
    actual, actual_grads, local = mesh_step(model, input_ids, documents, mesh, layout)
    counts = [torch.zeros((), dtype=torch.int64) for _ in range(ranks)]
    dist.all_gather(counts, (local["labels"] != IGNORED).sum())
    assert len({int(x) for x in counts}) > 1
    assert_close(actual, loss)
    assert_close(actual_grads, grads)


@spmd(axes={"cp": 2, "tp": 2})
def test_tp_with_cp(mesh):
    """torchtitan 2446, 3083: heads on one axis, the sequence on the other, DTensors or not."""
    case = Case(WINDOW, heads=4, kv_heads=2, sink=False)
    expected = truth(case, 2)
    for style in styles(2):
        mixer = mixer_on(mesh, style, WINDOW.mask)
        sharded = shard_case(case, mixer, mesh, HeadTail)
        placements = [Shard(1), Shard(2)]

        def place(x):
            local = sharded.shard(x).chunk(2, dim=2)[mesh["tp"].get_local_rank()]  # noqa: B023
            return DTensor.from_local(local.clone(), mesh, placements, run_check=False)  # noqa: B023

        q, k, v = (place(x).requires_grad_() for x in expected.inputs)
        out = mixer(q, k, v, sharded.attn_metadata)
        grads = torch.autograd.grad(out, (q, k, v), place(expected.grad_out))
        assert_close(out.to_local(), place(expected.out).to_local())
        for grad, right in zip(grads, expected.grads, strict=True):
            assert_close(grad.to_local(), place(right).to_local())


@pytest.mark.slow_where(lambda boundary: isinstance(boundary, EagerIsland))
@boundaries
@spmd(ranks=4)
def test_evaluation_on_another_layout_and_mesh_after_training(mesh, boundary):
    """A mode left over from training must not reach an evaluation on other terms, nor back."""
    case = Case(WINDOW, heads=4, kv_heads=2)
    model = Block(SoftmaxAttention(WINDOW.mask))
    alone = Block(SoftmaxAttention(WINDOW.mask))
    halves = Block(SoftmaxAttention(WINDOW.mask))
    pairs = mesh._unflatten(0, (2, 2), ("replicate", "cp"))["cp"]
    apply_plan(model, mesh, {"mixer": RingAttention(boundary=boundary)})
    apply_plan(halves, pairs, {"mixer": UlyssesAttention(boundary=boundary)})
    train, evaluate, other = (
        torch.compile(block, backend="aot_eager") for block in (model, alone, halves)
    )
    attn_metadata = batch_metadata(alone, case.documents(4))
    for layout in (HeadTail, Contiguous):
        assert_equals_one_device(case, train, model, mesh, layout)
        with torch.no_grad():
            q, k, v, sink = truth(case, 4).inputs
            assert_close(evaluate(q, k, v, attn_metadata, sink=sink), truth(case, 4).out)
            two = Case(WINDOW, heads=4, kv_heads=2, sink=False)
            sharded = shard_case(two, halves, pairs, layout)
            q, k, v = (x.detach() for x in local_inputs(two, sharded))
            assert_close(other(q, k, v, sharded.attn_metadata), sharded.shard(truth(two, 2).out))
    # A batch that was made for the one is refused by the other.
    sharded = shard_case(case, model, mesh, HeadTail)
    with pytest.raises(ValueError, match="needs a layout of as many shards"):
        halves.mixer.make_metadata(sharded.coords, sharded.layout)


def test_left_padding_is_refused():
    """Positions that start late, or an attention_mask that says where tokens begin."""
    for position_ids in ([1, 1, 0, 1, 2], [-1, -1, 0, 1, 2]):
        with pytest.raises(ValueError, match="left padding"):
            Documents.from_position_ids(torch.tensor([position_ids]))


@spmd(ranks=2)
def test_attention_mask_in_a_batch_is_refused(mesh):
    whole = ParallelMesh.from_device_mesh(mesh)
    batch = {"input_ids": torch.zeros(1, 8), "attention_mask": torch.tensor([[0] * 3 + [1] * 5])}
    with pytest.raises(ValueError, match=r"got \['attention_mask'\]"):
        shard_batch(batch, whole, HeadTail)


@spmd(ranks=2)
def test_dropout_is_refused(mesh):
    """Its pattern would depend on the mesh; the mixer has none, and the function says so."""
    q, k, v = sharded_qkv(mesh)
    with sequence_layout(HeadTail(SEQ_LEN, 2), mesh), pytest.raises(ValueError, match="no dropout"):
        captured(q, k, v, dropout_p=0.1)
    with pytest.raises(TypeError, match="dropout"):
        SoftmaxAttention(Causal(), dropout=0.1)


@pytest.mark.parametrize("length", [6, 7, 8, 9])
@spmd(ranks=4)
def test_no_token_of_a_document_is_lost(mesh, length):
    """Transformer Engine 1930: 7 tokens were treated as 6. PerDocument has no divisibility rule."""
    documents = Documents(((length,) * 3 + (1,),), 3 * length + 1)
    whole = ParallelMesh.from_device_mesh(mesh)
    mixer = mixer_on(mesh, RingAttention(), Causal())
    batch = {"input_ids": torch.zeros(1, documents.seq_len, dtype=torch.int64)}
    q, k, v = packings.qkv(documents, heads=HEADS, kv_heads=HEADS)
    visible = reference.visible(documents.lengths, documents.seq_len, reference.causal)
    expected, _ = reference.attention(q, k, v, visible)
    for layout in LAYOUTS:
        _, sharded = shard_batch(batch, whole, layout, model=mixer, documents=documents)
        out = sharded.gather(mixer(*map(sharded.shard, (q, k, v)), sharded.attn_metadata))
        assert_close(out, expected)


@spmd(ranks=4)
def test_positions_of_packed_documents_reach_the_ranks_that_hold_them(mesh):
    """Megatron 5243: RoPE's positions were those of the shard."""
    documents = packings.across_borders(48, 4)
    whole = ParallelMesh.from_device_mesh(mesh)
    position_ids = documents.position_ids()
    batch = {"input_ids": torch.zeros(1, 48, dtype=torch.int64), "position_ids": position_ids}
    for layout in LAYOUTS:
        local, sharded = shard_batch(batch, whole, layout, documents=documents)
        held = sharded.layout.token_indices(mesh.get_local_rank())
        real = held < 48
        assert_close(local["position_ids"][0, real], position_ids[0, held[real]])


@spmd(ranks=4)
def test_heads_that_do_not_divide_are_refused_and_never_cut(mesh):
    case = Case(CAUSAL, heads=6, kv_heads=2)
    for style in (UlyssesAttention(), HybridAttention(inner_ranks=4)):
        mixer = mixer_on(mesh, style, CAUSAL.mask)
        sharded = shard_case(case, mixer, mesh, HeadTail)
        with pytest.raises(ValueError, match="got heads=6, kv_heads=2, ranks=4"):
            run(case, mixer, sharded, local_inputs(case, sharded))
        dist.barrier()


@pytest.mark.parametrize("name", ["q", "k", "v", "out"])
@pytest.mark.parametrize("style", [RingAttention, AllGatherAttention, UlyssesAttention])
@spmd(ranks=2)
def test_writing_to_what_backward_reads_is_right_or_refused(mesh, style, name):
    """torch sees such a write to a tensor, and not to one that a DTensor was made from.

    With Ulysses, which keeps copies by heads, q, k and v may be written to.
    """
    model = apply_plan(
        nn.ModuleDict({"mixer": SoftmaxAttention(Causal())}), mesh, {"mixer": style()}
    )
    rows = {"inputs_embeds": torch.zeros(1, 16, 1)}
    _, sharded = shard_batch(rows, ParallelMesh.of_sequence(mesh), model=model)
    whole = {x: torch.randn(1, 16, 4, 8, dtype=torch.float64) for x in ("q", "k", "v")}
    leaves = {x: sharded.shard(y).requires_grad_() for x, y in whole.items()}

    def gradients(written=None):
        tensors = {x: 1 * y for x, y in leaves.items()}
        out = model["mixer"](*tensors.values(), sharded.attn_metadata)
        loss = out.sum()
        if written is not None:
            with torch.no_grad():
                {**tensors, "out": out}[written].mul_(3)
        return torch.autograd.grad(loss, [*leaves.values()])

    expected = gradients()
    if style is UlyssesAttention:
        assert_close(gradients(name), expected)
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            gradients(name)


@spmd(ranks=2)
def test_a_worker_of_a_loader_that_shards_batches_is_refused(mesh):
    """It was forked without the threads that exchange, and waited for ever."""
    mesh, ids = ParallelMesh.from_device_mesh(mesh), torch.arange(64)[None]
    is_worker = mock.patch(
        "dtcp.distributed.same_rows.get_worker_info", return_value=mock.Mock(id=3)
    )
    with is_worker, pytest.raises(ValueError, match="got one in worker 3 of a DataLoader: let"):
        shard_batch({"input_ids": ids}, mesh)
    assert shard_batch({"input_ids": ids}, mesh)[0]["input_ids"].shape == (1, 32)
