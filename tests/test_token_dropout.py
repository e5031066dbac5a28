"""Dropout by token: what it keeps, how evenly, and that no mesh changes it."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.testing import assert_close

from dtcp import (
    Causal,
    Degrees,
    Documents,
    HeadTail,
    ParallelMesh,
    PerDocument,
    RingAttention,
    SoftmaxAttention,
    TokenDropout,
    apply_plan,
    batch_metadata,
    shard_batch,
)
from dtcp.token_dropout import kept, mixed, token_keys
from tests.harness.dropped import keep
from tests.harness.parity import gradients, summed
from tests.harness.spmd import spmd

LENGTHS = ((20, 28), (48,))


class Model(nn.Module):
    """Attention between two places that drop."""

    def __init__(self):
        super().__init__()
        self.qkv, self.mixer = nn.Linear(16, 48), SoftmaxAttention(Causal())
        self.first, self.last = TokenDropout(0.3), TokenDropout(0.6)

    def forward(self, x, attn_metadata):
        qkv = self.qkv(self.first(x, attn_metadata))
        q, k, v = qkv.unflatten(-1, (3, 2, 8)).unbind(2)
        return self.last(self.mixer(q, k, v, attn_metadata).flatten(2), attn_metadata)


def model_and_rows():
    torch.manual_seed(0)
    return Model().double(), torch.randn(2, 48, 16).double(), torch.randn(2, 48, 16).double()


def by_hand(seed):
    """Output and gradients of dense attention, with the masks of numpy."""
    model, x, cotangent = model_and_rows()
    torch.manual_seed(seed)
    drawn = int(torch.randint(2**63 - 1, (1,)))
    places = np.arange(2)[:, None] + np.zeros((1, 48), int), np.arange(48) + np.zeros((2, 1), int)

    def drop(name, x, p):
        return x * keep(drawn, name, *places, 16, p) / (1 - p)

    qkv = model.qkv(drop("first", x, 0.3)).unflatten(-1, (3, 2, 8))
    q, k, v = (each.transpose(1, 2) for each in qkv.unbind(2))
    document = torch.tensor([[0] * 20 + [1] * 28, [0] * 48])
    seen = (document[:, :, None] == document[:, None]).tril()[:, None]
    scores = (q @ k.transpose(-1, -2) / 8**0.5).masked_fill(~seen, -torch.inf)
    out = drop("last", (scores.softmax(-1) @ v).transpose(1, 2).flatten(2), 0.6)
    (out * cotangent).sum().backward()
    return out.detach(), gradients(model)


MESHES = {2: Degrees(cp=2), 3: Degrees(cp=3), 4: Degrees(cp=2, dp_shard=2)}


@pytest.mark.slow_where(lambda ranks, compiled, layout: ranks == 3 or layout is PerDocument)
@pytest.mark.parametrize("layout", [HeadTail, PerDocument])
@pytest.mark.parametrize("compiled", [False, True])
@spmd(ranks=(2, 3, 4))
def test_every_rank_drops_what_one_device_drops(mesh, ranks, compiled, layout):
    """Packed documents; ranks that are seeded apart go by the first one's number."""
    mesh = ParallelMesh.from_degrees(MESHES[ranks], "cpu")
    expected, expected_grads = by_hand(seed=7)
    model, x, cotangent = model_and_rows()
    apply_plan(model, mesh.cp, {"mixer": RingAttention()})
    mine = slice(None) if mesh.batch is None else slice(mesh.rank("batch"), mesh.rank("batch") + 1)
    documents = Documents(LENGTHS[mine], 48)
    torch.manual_seed(7 + mesh.rank("cp"))
    rows = {"inputs_embeds": x[mine]}
    local, sharded = shard_batch(rows, mesh, layout, model=model, documents=documents)
    run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    out = run(local["inputs_embeds"], sharded.attn_metadata)
    assert_close(sharded.gather(out), expected[mine])
    (out * sharded.shard(cotangent[mine])).sum().backward()
    for name, parameter in model.named_parameters():
        assert_close(summed(parameter.grad, mesh), expected_grads[name])


def test_one_device_drops_the_same_without_a_mesh():
    expected, expected_grads = by_hand(seed=7)
    model, x, cotangent = model_and_rows()
    torch.manual_seed(7)
    out = model(x, batch_metadata(model, Documents(LENGTHS, 48)))
    (out * cotangent).sum().backward()
    assert_close(out, expected)
    assert_close(gradients(model), expected_grads)


def test_stages_of_a_rank_drop_what_their_modules_drop_in_the_whole_model():
    """Their place in the list counts where the names alone would let two drop the same."""
    x, documents = torch.ones(1, 8, 16), Documents(((8,),), 8)

    def dropped(model, *modules):
        torch.manual_seed(3)
        metadata = batch_metadata(model, documents)
        return [module(x, metadata) for module in modules]

    def stage(name):
        return nn.ModuleDict({name: TokenDropout(0.5)})

    whole = nn.ModuleDict({"first": TokenDropout(0.5), "last": TokenDropout(0.5)})
    stages = nn.ModuleList([stage("first"), stage("last")])
    assert_close(
        dropped(stages, stages[0]["first"], stages[1]["last"]),
        dropped(whole, whole["first"], whole["last"]),
    )
    alike = nn.ModuleList([stage("first"), stage("first")])
    one, other = dropped(alike, alike[0]["first"], alike[1]["first"])
    assert not torch.equal(one, other)


@pytest.mark.parametrize("p", [0.001, 0.05, 0.5, 0.9])
def test_each_channel_of_each_token_is_kept_by_itself(p):
    """At the rate asked for; whatever is compared, no more alike than chance has it."""
    channels = torch.arange(256, dtype=torch.int32)

    def kept_of(seed, number):
        keys = token_keys(torch.tensor(seed), torch.arange(3), torch.arange(512))
        kept_here = kept(keys, mixed(torch.tensor(number)), channels, p)
        return (kept_here.double() - (1 - p)) / (p * (1 - p)) ** 0.5

    def away(x):
        return float(x.mean().abs()) * x.numel() ** 0.5

    x = kept_of(3, 1)
    pairs = [x * kept_of(4, 1), x * kept_of(3, 2), x[0] * x[1], x[1] * x[2]]
    for gap in (1, 2, 5, 64):
        pairs += [x[..., gap:] * x[..., :-gap], x[:, gap:] * x[:, :-gap]]
        pairs += [x[:, gap:, gap:] * x[:, :-gap, :-gap]]
    assert max(map(away, [x, *pairs])) < 4.5
    for dim in (0, 1, 2):  # Sums vary as those of independent draws.
        sums = x.sum(dim) / x.shape[dim] ** 0.5
        assert abs(float(sums.square().mean()) - 1) < 6 * (2 / sums.numel()) ** 0.5 + 0.01 / p


def test_dropout_in_evaluation_and_at_both_ends_is_torchs():
    model, x, _ = model_and_rows()
    metadata = batch_metadata(model, Documents(LENGTHS, 48))
    drop = model.last
    assert drop.eval()(x) is x and TokenDropout(0.0)(x) is x
    assert_close(TokenDropout(1.0)(x), torch.zeros_like(x))
    for p, share in ((1 - 1e-12, 0.0), (1e-12, 1.0)):
        keys = token_keys(torch.tensor(3), torch.arange(2), torch.arange(48))
        mask = kept(keys, torch.tensor(1), torch.arange(16, dtype=torch.int32), p)
        assert float(mask.double().mean()) == share
    drop.train()
    half = drop(x.bfloat16(), metadata)
    assert half.dtype == torch.bfloat16
    assert_close(half[half != 0], (x.bfloat16() / 0.4)[half != 0], rtol=0.01, atol=0.0)
    # As flat rows of tokens, and with channels in several dims.
    assert_close(drop(x.flatten(0, 1), metadata), drop(x, metadata).flatten(0, 1))
    assert_close(drop(x.unflatten(2, (4, 4)), metadata), drop(x, metadata).unflatten(2, (4, 4)))


def test_a_batch_without_keys_and_other_tokens_are_refused():
    model, x, _ = model_and_rows()
    before = torch.get_rng_state()
    of_evaluation = batch_metadata(model.eval(), Documents(LENGTHS, 48))
    assert torch.equal(torch.get_rng_state(), before)
    model.train()
    for arguments in ((x,), (x, of_evaluation)):
        with pytest.raises(ValueError, match=r"call model.train\(\) first"):
            model.last(*arguments)
    with pytest.raises(ValueError, match=r"x.shape=\(2, 47, 16\) for tokens \(2, 48\)"):
        model.last(x[:, :47], batch_metadata(model, Documents(LENGTHS, 48)))
    with pytest.raises(ValueError, match=r"got p=1.5"):
        TokenDropout(1.5)
    model.last.width, model.last.tp_size = 16, 2
    with pytest.raises(ValueError, match=r"got 12 of 16 on one of 2 ranks: set p=0\.6 to 0"):
        model.last(x[..., :12], batch_metadata(model, Documents(LENGTHS, 48)))


@spmd(ranks=2)
def test_never_silent_one_rank_in_evaluation_where_the_other_drops(mesh):
    mesh = ParallelMesh.from_degrees(MESHES[2], "cpu")
    model, x, _ = model_and_rows()
    apply_plan(model, mesh.cp, {"mixer": RingAttention()})
    model.train(mesh.rank("cp") == 0)
    with pytest.raises(ValueError, match=r"in training mode, with p above 0, on 1 of 2 ranks"):
        shard_batch({"inputs_embeds": x}, mesh, model=model)
    shard_batch({"inputs_embeds": x}, mesh, model=model.eval())


@spmd(axes={"tp": 2})
def test_channels_of_a_dtensor_are_those_of_the_whole(mesh):
    model, x, _ = model_and_rows()
    torch.manual_seed(7)
    metadata = batch_metadata(model, Documents(LENGTHS, 48))
    expected = model.last(x, metadata)
    for placement in (Replicate(), Shard(2)):
        placed = distribute_tensor(x, mesh, [placement])
        assert_close(model.last(placed, metadata).full_tensor(), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_a_gpu_drops_what_a_host_drops(compiled):
    """Products of 32 and of 64 bits wrap around there as here, in inductor's kernels, too."""
    model, x, _ = model_and_rows()
    metadata = batch_metadata(model, Documents(LENGTHS, 48))
    drop = torch.compile(model.last, fullgraph=True) if compiled else model.last
    assert_close(drop(x.cuda(), metadata.to("cuda")).cpu(), model.last(x, metadata))
