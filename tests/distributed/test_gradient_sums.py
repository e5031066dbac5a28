"""Gradients of shares of a loss are summed over ranks, or refused where that is seen not to be."""

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed._composable.replicate import replicate
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from dtcp import (
    Causal,
    Degrees,
    Documents,
    ParallelMesh,
    RingAttention,
    SoftmaxAttention,
    apply_plan,
    batch_metadata,
    causal_lm_loss,
    shard_batch,
)
from dtcp.distributed.gradient_sums import check_gradients_summed
from dtcp.huggingface import WholeRows, install_mixers
from dtcp.labels import shift_labels
from dtcp.linear_logits import LinearLogits
from dtcp.loss import global_token_count, token_mean_loss
from tests.harness.attention_parity import refused
from tests.harness.spmd import spmd

IDS = torch.arange(1, 33)[None] * 7 % 16
ONE = Documents.single(1, 32)
LABELS = shift_labels(IDS, ONE)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.qkv = nn.Embedding(16, 8), nn.Linear(8, 24)
        self.mixer, self.head = SoftmaxAttention(Causal()), nn.Linear(8, 16, bias=False)

    def forward(self, ids, attn_metadata, with_head=True):
        q, k, v = self.qkv(self.embed(ids)).unflatten(-1, (3, 2, 4)).unbind(2)
        hidden = self.mixer(q, k, v, attn_metadata).flatten(2)
        return self.head(hidden) if with_head else hidden.clone()


def build():
    torch.manual_seed(0)
    return Model().double()


def expected_gradient():
    model = build()
    logits = model(IDS, batch_metadata(model, ONE))
    token_mean_loss(logits, LABELS, (LABELS != -100).sum()).backward()
    return model.qkv.weight.grad


def claimed(mesh):
    return apply_plan(build(), mesh.cp, {"mixer": RingAttention()})


def shards(model, mesh):
    local, sharded = shard_batch({"input_ids": IDS, "labels": LABELS}, mesh, model=model)
    tokens = global_token_count(local["labels"], mesh.loss)
    return (local["input_ids"], sharded.attn_metadata), local["labels"], tokens


@spmd(ranks=2)
def test_shares_of_a_model_whose_fsdp_averages_are_refused(mesh):
    """Until somebody has named what gradients are divided by."""
    on = ParallelMesh.from_degrees(Degrees(cp=2), "cpu")
    model = fully_shard(claimed(on), mesh=on.hsdp)
    inputs, labels, tokens = shards(model, on)
    logits, hidden = model(*inputs), model(*inputs, with_head=False)
    head = LinearLogits(hidden, torch.zeros(16, 8, dtype=torch.float64))
    for output in (logits, head):
        refused("averages over 2 ranks", lambda x=output: token_mean_loss(x, labels, tokens))
    with torch.no_grad():
        token_mean_loss(model(*inputs), labels, tokens)
    model.reshard()
    model.set_force_sum_reduction_for_comms(True)
    # With a loss that makes up for the average, and without.
    for factor in (2.0, 1.0):
        model.set_gradient_divide_factor(factor)
        model.zero_grad()
        (factor * token_mean_loss(model(*inputs), labels, tokens)).backward()
        assert_close(model.qkv.weight.grad.full_tensor(), expected_gradient())


def sums(group, bucket):
    return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda x: x.value()[0])


@spmd(ranks=2)
def test_a_model_in_ddp_is_refused_unless_its_hook_sums(mesh):
    on = ParallelMesh.from_degrees(Degrees(cp=2), "cpu")

    class WithLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = claimed(on)

        def forward(self, inputs, labels, tokens):
            return token_mean_loss(self.model(*inputs), labels, tokens)

    ddp = DistributedDataParallel(WithLoss())
    with pytest.warns(UserWarning, match="averages over 2 ranks and makes them 2 times too small"):
        inputs, labels, tokens = shards(ddp, on)
    refused("DistributedDataParallel, which averages", lambda: ddp(inputs, labels, tokens))
    ddp = DistributedDataParallel(WithLoss())
    ddp.register_comm_hook(None, sums)
    inputs, labels, tokens = shards(ddp, on)
    ddp(inputs, labels, tokens).backward()
    assert_close(ddp.module.model.qkv.weight.grad, expected_gradient())
    check_gradients_summed(ddp, on)


AVERAGING = (
    default_hooks.allreduce_hook,
    default_hooks.fp16_compress_hook,
    default_hooks.fp16_compress_wrapper(default_hooks.allreduce_hook),
)
"""Hooks of torch's own: each divides by the ranks."""


@spmd(ranks=2)
def test_hooks_of_torch_average(mesh):
    on = ParallelMesh.from_degrees(Degrees(cp=2), "cpu")
    for hook in AVERAGING:
        ddp = DistributedDataParallel(nn.Linear(4, 4))
        ddp.register_comm_hook(None, hook)
        refused("which averages over 2 ranks", lambda x=ddp: check_gradients_summed(x, on))
    ddp = DistributedDataParallel(nn.Linear(4, 4))
    ddp.register_comm_hook(None, default_hooks.fp16_compress_wrapper(sums))
    check_gradients_summed(ddp, on)


@spmd(ranks=2)
def test_other_wrappers_that_average_are_refused(mesh):
    on = ParallelMesh.from_degrees(Degrees(cp=2), "cpu")
    sharded = FullyShardedDataParallel(nn.Linear(4, 4), device_id=torch.device("cpu"))
    refused("FullyShardedDataParallel, which aver", lambda: check_gradients_summed(sharded, on))
    for kwargs in ({}, {"device_mesh": on.cp}):
        model = replicate(nn.Linear(4, 4), **kwargs)
        refused("replicate`, which averages", lambda x=model: check_gradients_summed(x, on))
        model(torch.ones(1, 4))  # makes its DDP
        refused("replicate`, which averages", lambda x=model: check_gradients_summed(x, on))
    model = replicate(nn.Linear(4, 4))
    model.register_comm_hook(None, sums)
    check_gradients_summed(model, on)
    model(torch.ones(1, 4))
    check_gradients_summed(model, on)


def of_transformers(mesh):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = AutoConfig.for_model("qwen3", vocab_size=16, pad_token_id=0, **sizes, **heads)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    install_mixers(model)
    return apply_plan(model, mesh.cp, {"model.layers.*.self_attn.dtcp_mixer": RingAttention()})


@spmd(ranks=2)
def test_losses_of_a_model_of_transformers_that_averages_are_refused(mesh):
    on, rows = ParallelMesh.from_degrees(Degrees(cp=2), "cpu"), {"input_ids": IDS, "labels": IDS}
    model = fully_shard(of_transformers(on), mesh=on.hsdp)
    ddp = DistributedDataParallel(of_transformers(on))
    for each in (model, ddp):
        refused("averages over 2 ranks", lambda x=each: causal_lm_loss(x, rows, on))
        refused("averages over 2 ranks", lambda x=each: WholeRows(x, on)(**rows))
        with torch.no_grad():
            assert causal_lm_loss(each, rows, on) > 0
    model.set_gradient_divide_factor(1.0)
    assert causal_lm_loss(model, rows, on) > 0


@spmd(ranks=4)
def test_fsdp_over_a_part_of_the_ranks_of_a_loss_is_warned_of(mesh):
    on = ParallelMesh.from_degrees(Degrees(dp_shard=2, cp=2), "cpu")
    rows = {"input_ids": IDS, "labels": IDS}
    model = fully_shard(of_transformers(on), mesh=on.device_mesh["dp_shard"])
    model.set_gradient_divide_factor(1.0)
    with pytest.warns(UserWarning, match="reduces them over 2 of 4 ranks"):
        causal_lm_loss(model, rows, on)
