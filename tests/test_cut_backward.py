"""Backward passes of whole models that run again, and cut in two: gradients stay what they were."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.distributed._composable.replicate import replicate
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from dtcp.batch import shard_batch
from dtcp.cut_backward import check_backward_can_be_cut, check_gradients_arrived
from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.experts.losses import RouterLoss
from dtcp.labels import shift_labels
from dtcp.loss import global_token_count, token_mean_loss
from dtcp.models.deepseek_v4 import DeepseekV4, tiny
from dtcp.models.gemma4 import Gemma4
from dtcp.models.gemma4 import config as gemma4
from dtcp.models.llama import Llama
from dtcp.models.qwen3_5 import Qwen35
from dtcp.parallelize import (
    FSDP,
    FullCheckpoint,
    ParallelPlan,
    SelectiveCheckpoint,
    deepseek_v4_plan,
    gemma4_plan,
    llama_plan,
    parallelize,
    qwen3_5_plan,
)
from dtcp.sequence.documents import Documents
from dtcp.softmax import AllGatherAttention, RingAttention, UlyssesAttention
from tests.harness.parity import CONFIG, GRAPHS, gradients
from tests.harness.spmd import spmd
from tests.models.test_parity_qwen3_5 import EXPERTS

SEQ_LEN = 96
ROWS = ((37, 3, 49), (70, 26))
GATHERED = FSDP(reshard_after_forward=False)


class Family(NamedTuple):
    """A model, and its plan on a mesh."""

    config: object
    model: type
    plan: object


def family(name: str) -> Family:
    """By the mixers it has: attention in three ways, delta rule, convolution, sparse, experts."""
    if name == "ring":
        return Family(CONFIG, Llama, lambda mesh: llama_plan(CONFIG, mesh, RingAttention()))
    if name == "ulysses":
        return Family(CONFIG, Llama, lambda mesh: llama_plan(CONFIG, mesh, UlyssesAttention()))
    if name == "gathered, recurrent, experts":
        gather = AllGatherAttention()
        return Family(EXPERTS, Qwen35, lambda mesh: qwen3_5_plan(EXPERTS, mesh, gather))
    if name == "windows":
        gemma = gemma4.tiny()
        return Family(gemma, Gemma4, lambda mesh: gemma4_plan(gemma, mesh, RingAttention()))
    config = tiny()
    return Family(config, DeepseekV4, lambda mesh: deepseek_v4_plan(config, mesh))


class Step:
    """A model on a mesh, and a batch of packed rows; what blocks are given is a leaf."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        self.mesh = ParallelMesh.from_degrees(Degrees(cp=2), "cpu")
        config, model, plan = family(name)
        self.model = model(config).double()
        embedding = next(x for x in self.model.modules() if isinstance(x, nn.Embedding))
        embedding.register_forward_hook(self._cut_off)
        parallelize(self.model, self.mesh, plan(self.mesh), fsdp=GATHERED)
        documents = Documents(ROWS, SEQ_LEN)
        input_ids = torch.randint(config.vocab_size, (len(ROWS), SEQ_LEN))
        batch = {"input_ids": input_ids, "position_ids": documents.position_ids()}
        batch["labels"] = shift_labels(input_ids, documents)
        self.local, sharded = shard_batch(batch, self.mesh, model=self.model, documents=documents)
        self.metadata = sharded.attn_metadata

    def _cut_off(self, module: nn.Module, args: tuple, out: Tensor) -> Tensor:
        self.x = out.detach().requires_grad_()
        return self.x

    def loss(self) -> Tensor:
        local = self.local
        tokens = global_token_count(local["labels"], self.mesh.loss)
        logits = self.model(local["input_ids"], local["position_ids"], self.metadata)
        return token_mean_loss(logits, local["labels"], tokens)

    def take_gradients(self) -> dict[str, Tensor]:
        taken = {"x": self.x.grad, **{k: g.clone() for k, g in gradients(self.model).items()}}
        self.x.grad = None
        self.model.zero_grad()
        return taken

    def backward_in_two(self, loss: Tensor) -> None:
        """As a stage of torch's does, and reduces gradients at the end."""
        for sync in (False, True):
            self.model.set_is_last_backward(sync)
            self.model.set_reshard_after_backward(sync)
            self.model.set_requires_gradient_sync(sync)
            if not sync:
                _, groups = stage_backward_input([loss], None, [self.x], self.model.parameters())
                stage_backward_weight(self.model.parameters(), groups)
        root = fully_shard.state(self.model)
        for state in root._state_ctx.all_states:
            for group in state._fsdp_param_groups:
                group.post_backward()
        root._root_post_backward_final_callback()


@pytest.mark.parametrize(
    "name", ["ring", "ulysses", "gathered, recurrent, experts", "windows", "sparse"]
)
@spmd(ranks=2)
def test_backward_again_and_in_two_has_the_gradients_of_the_first(mesh, name):
    """Which equal one device's: parity tests hold them to it."""
    step = Step(name)
    loss = step.loss()
    loss.backward(retain_graph=True)
    first = step.take_gradients()
    loss.backward()
    assert_close(step.take_gradients(), first, rtol=0, atol=0)
    step.backward_in_two(step.loss())
    assert_close(step.take_gradients(), first)
    assert len(first) > 40 and first["x"].any()


def test_losses_of_routers_have_their_gradient_once_where_a_backward_pass_is_cut():
    torch.manual_seed(0)
    router, loss = nn.Linear(8, 4).double(), RouterLoss(balance=0.3, z=0.2)
    x = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)

    def routed() -> Tensor:
        logits = router(x)
        weight, index = (probabilities := logits.softmax(-1)).topk(2)
        chosen = {"logits": logits, "probabilities": probabilities, "index": index}
        return loss(weight, **chosen, real=None).square().sum()

    routed().backward()
    first = [router.weight.grad, router.bias.grad, x.grad]
    router.weight.grad = router.bias.grad = x.grad = None
    _, groups = stage_backward_input([routed()], None, [x], router.parameters())
    stage_backward_weight(router.parameters(), groups)
    assert_close([router.weight.grad, router.bias.grad, x.grad], first)


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def refused(match: str, stage: nn.Module) -> None:
    with pytest.raises(ValueError, match=match):
        check_backward_can_be_cut(stage)


@spmd(ranks=2)
def test_stages_whose_weights_would_be_missed_are_refused(mesh):
    on, plan = ParallelMesh.from_degrees(Degrees(cp=2), "cpu"), ParallelPlan({}, {}, ("layers.*",))
    freed = parallelize(Layers(), on, plan)
    refused(r"got 'layers\.0' with reshard_after_forward=True: pass fsdp=FSDP", freed)
    freed.set_reshard_after_forward(False)
    check_backward_can_be_cut(freed)
    check_backward_can_be_cut(parallelize(Layers(), on, plan, fsdp=GATHERED))
    # A root without a choice of its own stays gathered; weights that are not trained are no loss.
    check_backward_can_be_cut(fully_shard(Layers(), mesh=mesh))
    refused("'FSDPLayers' with", fully_shard(Layers(), mesh=mesh, reshard_after_forward=True))
    frozen = Layers().requires_grad_(False)
    check_backward_can_be_cut(parallelize(frozen, on, plan))
    outside = Layers()
    fully_shard(outside.layers[0], mesh=mesh, reshard_after_forward=False)
    refused(r"got 'layers\.0' in a Layers, which is none: call fully_shard of", outside)
    refused("calls no hooks .* of DistributedDataParallel", DistributedDataParallel(Layers()))
    refused("calls no hooks that reduce .* of DDPLayers", replicate(Layers()))
    refused("calls no hooks that reduce", FullyShardedDataParallel(Layers(), device_id="cpu"))
    stepped = Layers()
    stepped.layers[1].bias.register_post_accumulate_grad_hook(lambda weight: None)
    refused(r"hooks of gradients .* got one of 'layers\.1\.bias': call fully_shard", stepped)
    # FSDP calls it.
    check_backward_can_be_cut(fully_shard(stepped, mesh=mesh))


@spmd(ranks=2)
def test_graphs_that_run_backward_once_are_refused(mesh):
    on, plan = ParallelMesh.from_degrees(Degrees(cp=2), "cpu"), ParallelPlan({}, {}, ("layers.*",))

    def stage(**how: object) -> nn.Module:
        return parallelize(Layers(), on, plan, fsdp=GATHERED, **how)

    refused("are compiled", stage(compile=GRAPHS))
    by_hand = stage()
    by_hand.layers[0].compile(backend="eager")
    refused("are compiled", by_hand)
    refused("are compiled", torch.compile(Layers(), backend="eager"))
    check_backward_can_be_cut(stage(activation_checkpoint=FullCheckpoint()))
    for keeps_some in (SelectiveCheckpoint(), FullCheckpoint().keeping_routes()):
        refused("recomputes twice", stage(activation_checkpoint=keeps_some))


def test_frozen_weights_need_no_gradients_and_others_do():
    stage = nn.Linear(2, 2)
    stage.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"got none for 1 of stage 3, 'bias' for one"):
        check_gradients_arrived([(3, stage)])
    stage.bias.grad = torch.zeros(2)
    check_gradients_arrived([(3, stage)])
