"""Gradients of keys that ranks have found apart are as exact as one device's, where asked for."""

from dataclasses import replace

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dtcp.batch import shard_batch
from dtcp.compile import EagerIsland
from dtcp.distributed.dtensor_rules import to_local
from dtcp.distributed.ledger import count_traffic
from dtcp.distributed.mesh import ParallelMesh
from dtcp.distributed.ops import moves_of
from dtcp.mixer_metadata import batch_metadata
from dtcp.mixer_plan import apply_plan
from dtcp.sdpa.local_shards import local_shards
from dtcp.sequence.layout import Contiguous, HeadTail
from dtcp.softmax import (
    AllGatherAttention,
    HaloAttention,
    HybridAttention,
    RingAttention,
    SharedKVAttention,
    UlyssesAttention,
    all_gather,
    gathered_rows,
    local,
    ring,
)
from dtcp.softmax.mixer import GatherSharedKV, LatentAttention, SoftmaxAttention, name_kernel
from dtcp.softmax.moves import AttentionShape
from dtcp.thd import shard_thd, to_thd
from dtcp.thd_attention import PackedAttention
from tests.harness import packings, reference
from tests.harness.attention_parity import (
    BIDIRECTIONAL,
    CAUSAL,
    WINDOW,
    Case,
    local_inputs,
    mixer_on,
    refused,
    run,
    shard_case,
    styles,
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


class Stated(TorchDispatchMode):
    """Sums up what ops say that they receive."""

    received = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if (moves := moves_of(op)) is not None:
            self.received += sum(moves(*to_local(args), **to_local(kwargs or {})).received)
        return op(*args, **(kwargs or {}))


def held_to_formulas(mesh, style, mixer, sharded, shape, step):
    """What a step returns, and the bytes that all ranks received in it: as style and ops say."""
    with count_traffic() as traffic, Stated() as stated:
        results = step()
    moves = style.moves(mixer, sharded.coords, sharded.layout, mesh.get_local_rank(), shape)
    received = moves.received.forward + moves.received.backward
    assert traffic.received == received == stated.received, style
    return results, of_all_ranks(received)


def of_all_ranks(count):
    total = torch.tensor(count)
    dist.all_reduce(total)
    return int(total)


def ratios(sharded, ours, theirs, exact):
    """Of each of our local results, the error over that of a whole one of theirs, all ranks'."""
    found = []
    for own, other, right in zip(ours, theirs, exact, strict=True):
        at = sharded.shard(right.detach())
        errors = [(x.detach() - at).square().sum() for x in (own, sharded.shard(other))]
        error = torch.stack(errors)
        dist.all_reduce(error)
        found.append(float((error[0] / error[1]).sqrt()))
    return found


def compared(mesh, style, case, layout):
    """The error of out, dq, dk and dv over one device's; bytes received by all ranks."""
    n, mixer = mesh.size(), mixer_on(mesh, style, case.mask_case.mask)
    sharded, right = shard_case(case, mixer, mesh, layout), truth(case, n)
    shape = AttentionShape(1, case.heads, case.kv_heads, case.key_dim, case.value_dim, 2)

    def step():
        out, grads = run(case, mixer, sharded, local_inputs(case, sharded))
        return out, *grads

    results, received = held_to_formulas(mesh, style, mixer, sharded, shape, step)
    exact = (right.out, *right.grads)
    return ratios(sharded, results, on_one_device(case, n), exact), received


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


OF = {"mask_case": BIDIRECTIONAL, "packing": packings.one_document, "sink": False}
OF |= {"dtype": torch.bfloat16, "seq_len": 128}


@pytest.mark.parametrize("per_node", [0, 2])
@spmd(ranks=4)
def test_gradients_of_heads_that_are_dealt_out_have_the_error_of_one_device(mesh, per_node):
    """Between groups, and inside one where ranks share a kv head."""
    outers, inner = (RingAttention(), AllGatherAttention()), {"inner_ranks": 2}
    styles = [HybridAttention(outer=outer, **inner) for outer in outers]
    for style in (*styles, UlyssesAttention()):
        style = replace(style, ranks_per_node=per_node)
        for kv_heads in (1,) if per_node else (1, 2):
            case = Case(kv_heads=kv_heads, **OF)
            rounded, few = compared(mesh, style, case, HeadTail)
            wide, more = compared(mesh, replace(style, reduce_dtype=WIDE), case, HeadTail)
            assert max(*wide, *rounded[:2]) <= 1.1, f"{wide} and {rounded} with {style}"
            assert min(rounded[2:]) > 1.15 and more > few, f"{rounded} with {style}"


@spmd(ranks=2)
def test_where_nothing_is_summed_nothing_travels_in_fp32(mesh):
    """Each kv head is on one rank, where one kernel sums its gradients."""
    for style in (UlyssesAttention(), HybridAttention()):
        case = Case(**OF)
        rounded, few = compared(mesh, style, case, HeadTail)
        wide, more = compared(mesh, replace(style, reduce_dtype=WIDE), case, HeadTail)
        assert wide == rounded and more == few and max(wide) <= 1.1


@spmd(ranks=1)
def test_one_rank_sums_nothing_over_ranks(mesh):
    """So a kernel that rounds may compute it: the fastest."""
    for style in (RingAttention, AllGatherAttention, UlyssesAttention, SharedKVAttention):
        mixer = mixer_on(mesh, style(reduce_dtype=WIDE), CAUSAL.mask)
        assert not mixer.wide
        name_kernel(mixer, "cudnn")


@spmd(ranks=2)
def test_gradients_of_shared_keys_have_the_error_of_one_device(mesh):
    """Two layers read them: their gradients are summed in fp32 before they go home."""
    exact, grad_outs, whole = _two_layers(torch.float64)
    alone = _two_layers(torch.bfloat16)[0]
    received, said = [], []
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(gathered_rows, "_say_rounded", lambda: said.append(len(received)))
    for wide in (None, WIDE):
        model = nn.ModuleDict({"gather": GatherSharedKV(CAUSAL.mask)})
        model.update({f"layer{i}": SoftmaxAttention(CAUSAL.mask) for i in range(2)})
        style = SharedKVAttention(reduce_dtype=wide)
        apply_plan(model, mesh, dict.fromkeys(model, style))
        ids, ranks = torch.zeros(1, 128, dtype=torch.int64), ParallelMesh.of_sequence(mesh)
        _, sharded = shard_batch({"input_ids": ids}, ranks, HeadTail, model=model)
        inputs = [sharded.shard(x.bfloat16()).requires_grad_() for x in whole]
        grads = [sharded.shard(x.bfloat16()) for x in grad_outs]

        def step(model=model, sharded=sharded, inputs=inputs, grads=grads):
            rows = model["gather"](inputs[2], sharded.attn_metadata)
            k, v = rows.chunk(2, dim=-1)
            outs = [
                model[f"layer{i}"](q, k, v, sharded.attn_metadata) for i, q in enumerate(inputs[:2])
            ]
            return *outs, *torch.autograd.grad(outs, inputs, grads)

        shape = AttentionShape(1, 2, 2, 8, 8, 2)
        results, bytes_ = held_to_formulas(mesh, style, model["gather"], sharded, shape, step)
        found = ratios(sharded, results, alone, exact)
        received.append(bytes_)
        assert max(found[:-1]) <= 1.1
        assert found[-1] <= 1.0 if wide else found[-1] > 1.1, f"{found} with {style}"
    monkeypatch.undo()
    assert said == [0]
    # In bf16 rows and gradients are as many bytes; in fp32 gradients are twice as many.
    assert 2 * received[1] == 3 * received[0]
    narrow = inputs[2].detach()
    with pytest.raises(TypeError, match="stay in the dtype in which layers sum their gradients"):
        model["layer0"](inputs[0], *narrow.chunk(2, dim=-1), sharded.attn_metadata)


def _two_layers(dtype):
    """out of two layers and gradients of their queries and of the rows [k | v] that both read."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(1, 128, 4, 8)] * 2 + [(1, 128, 2, 16)]
    whole = [torch.randn(x, generator=generator).bfloat16() for x in shapes]
    grad_outs = [torch.randn(shapes[0], generator=generator).bfloat16() for _ in range(2)]
    inputs = [x.to(dtype).requires_grad_() for x in whole]
    k, v = inputs[2].chunk(2, dim=-1)
    mixer, documents = SoftmaxAttention(CAUSAL.mask), packings.one_document(128, 2)
    visible = CAUSAL.visible(documents)

    def attend(q):
        if dtype == torch.float64:
            return reference.attention(q, k, v, visible)[0]
        return mixer(q, k, v, batch_metadata(mixer, documents))

    outs = [attend(q) for q in inputs[:2]]
    grads = torch.autograd.grad(outs, inputs, [x.to(dtype) for x in grad_outs])
    return (*outs, *grads), grad_outs, whole


@spmd(ranks=2)
def test_gradients_of_latents_have_the_error_of_one_device(mesh):
    """What is folded back into them is rounded as little as what travels."""
    exact, grad_out, whole = _latents(torch.float64)
    alone, ids = _latents(torch.bfloat16)[0], torch.zeros(1, 128, dtype=torch.int64)
    shape = AttentionShape(1, 4, 4, 10, 5, 2, latent=16)
    for kind in (RingAttention, AllGatherAttention):
        found, received = [], []
        for style in (kind(), kind(reduce_dtype=WIDE)):
            mixer = LatentAttention(BIDIRECTIONAL.mask)
            apply_plan(nn.ModuleDict({"mixer": mixer}), mesh, {"mixer": style})
            ranks = ParallelMesh.of_sequence(mesh)
            _, sharded = shard_batch({"input_ids": ids}, ranks, HeadTail, model=mixer)
            inputs = [x.bfloat16() for x in (*map(sharded.shard, whole[:3]), whole[3])]
            inputs = [x.clone().requires_grad_() for x in inputs]

            def step(mixer=mixer, sharded=sharded, inputs=inputs):
                out = mixer(*inputs, sharded.attn_metadata)
                return out, *torch.autograd.grad(out, inputs[:3], sharded.shard(grad_out))

            results, bytes_ = held_to_formulas(mesh, style, mixer, sharded, shape, step)
            found.append(ratios(sharded, results, alone, exact))
            received.append(bytes_)
        rounded, wide = found
        assert max(*wide, *rounded[:2]) <= 1.1, f"{rounded} and {wide} with {kind}"
        assert wide[2] < 0.95 * rounded[2], f"{rounded} and {wide} with {kind}"
        assert 3 * received[1] == 4 * received[0]


def _latents(dtype):
    """out of latent attention, gradients of queries, latents and rotary keys; what these are of."""
    generator = torch.Generator().manual_seed(5)
    shapes = [(1, 128, 4, 10), (1, 128, 12), (1, 128, 4), (4, 11, 12)]
    whole = [torch.randn(x, generator=generator).bfloat16() for x in shapes]
    grad_out = torch.randn((1, 128, 4, 5), generator=generator).bfloat16()
    inputs = [x.to(dtype).requires_grad_() for x in whole]
    mixer, documents = LatentAttention(BIDIRECTIONAL.mask), packings.one_document(128, 2)
    if dtype == torch.float64:
        q, latent, rotary, up = inputs
        made = torch.einsum("bsc,hwc->bshw", latent, up)
        k = torch.cat((made[..., :6], rotary[:, :, None].expand(-1, -1, 4, -1)), dim=-1)
        out, _ = reference.attention(q, k, made[..., 6:], BIDIRECTIONAL.visible(documents))
    else:
        out = mixer(*inputs, batch_metadata(mixer, documents))
    grads = torch.autograd.grad(out, inputs[:3], grad_out.to(dtype))
    return (out, *grads), grad_out, whole


@spmd(ranks=2)
def test_a_style_sums_in_fp32_at_every_door_that_takes_one(mesh):
    """A third more bytes, as of mixers."""
    q, k, v = (torch.randn(1, heads, 32, 8).bfloat16() for heads in (4, 2, 2))
    ids, lengths, layout = torch.zeros(1, 64).long(), torch.tensor([[64]]), HeadTail(64, 2)
    rows = {"input_ids": ids, "labels": ids, "seq_lens": lengths, "seq_lens_padded": lengths}
    part = shard_thd(to_thd(rows), mesh)

    def inside(style, *qkv):
        with local_shards(layout, mesh, style=style):
            return F.scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=True)

    def on_slots(style, *qkv):
        attend = PackedAttention.of(part, mesh, style=style)
        return attend(*(x[0].transpose(0, 1) for x in qkv))

    for door in (inside, on_slots):
        received = []
        for style in (RingAttention(), RingAttention(reduce_dtype=WIDE)):
            inputs = [x.detach().requires_grad_() for x in (q, k, v)]
            with count_traffic() as traffic:
                out = door(style, *inputs)
                torch.autograd.grad(out, inputs, torch.ones_like(out))
            received.append(of_all_ranks(traffic.received))
        assert 3 * received[1] == 4 * received[0] > 0
        for style in (RingAttention, AllGatherAttention):
            # And leaves nothing on its way: the ranks can go on.
            refused(
                "got kernel='cudnn', which does not run on a cpu",
                lambda door=door, style=style: door(style(kernel="cudnn"), q, k, v),
            )
        with pytest.raises(ValueError, match=r"one op wherever it is called, got boundary=Eager"):
            door(RingAttention(boundary=EagerIsland()), q, k, v)
        with pytest.raises(ValueError, match=r"keys of its own call, got style=SharedKVAttention"):
            door(SharedKVAttention(), q, k, v)


def test_what_cannot_sum_in_fp32_is_refused():
    with pytest.raises(ValueError, match=r"got reduce_dtype=torch.float16: give it None or"):
        RingAttention(reduce_dtype=torch.float16)
    with pytest.raises(ValueError, match=r"with kernel='cudnn': name one of auto, triton, ref"):
        AllGatherAttention(reduce_dtype=WIDE, kernel="cudnn")
    with pytest.raises(
        ValueError, match=r"of the RingAttention inside: give it to HybridAttention"
    ):
        HybridAttention(outer=RingAttention(reduce_dtype=WIDE))
    with pytest.raises(ValueError, match=r"inside: give it to SharedKVAttention"):
        SharedKVAttention(AllGatherAttention(reduce_dtype=WIDE))


@spmd(ranks=2)
def test_a_kernel_that_rounds_is_refused_where_it_is_named(mesh):
    rounds = "with kernel='flash': name one of auto, triton, ref"
    with pytest.raises(ValueError, match=rounds):
        mixer_on(mesh, RingAttention(reduce_dtype=WIDE), CAUSAL.mask, kernel="flash")
    mixer = mixer_on(mesh, RingAttention(reduce_dtype=WIDE), CAUSAL.mask)
    model = nn.ModuleList([SoftmaxAttention(CAUSAL.mask), mixer])
    with pytest.raises(ValueError, match=rounds):
        name_kernel(model, "flash")
    assert [each.kernel for each in model] == ["auto", "auto"]


@spmd(ranks=2)
def test_it_is_said_where_ranks_sum_what_kernels_have_rounded(mesh):
    """Of every strategy, and of none whose kv heads are on one rank each."""
    said = []
    with pytest.MonkeyPatch.context() as patch:
        for module in (all_gather, local, ring):
            patch.setattr(module, "note_rounded_sums", lambda *_: said.append(True))
        for style in styles(2):
            for kv_heads in (1, 2):
                said.clear()
                case = Case(mask_case=WINDOW, kv_heads=kv_heads, sink=False)
                mixer = mixer_on(mesh, style, WINDOW.mask)
                sharded = shard_case(case, mixer, mesh, HeadTail)
                run(case, mixer, sharded, local_inputs(case, sharded))
                by_heads = isinstance(style, UlyssesAttention | HybridAttention)
                assert bool(said) == (kv_heads == 1 or not by_heads), f"{style}, {kv_heads}"
