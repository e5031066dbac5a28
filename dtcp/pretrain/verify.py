"""Prove a mesh: the first steps on it and on one device have the same losses and gradients.

The one device is a plain model with plain tensors: no Trainer, no DTensor, no FSDP and no
sharded batch, from the same weights, over the same rows. The weights are taken from the mesh,
whole, wherever they come from.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from dtcp.torchtitan.attention import add_mixers
from dtcp.torchtitan.compat import float64_by_name, without_spmd_types
from dtcp.torchtitan.model_spec import BeforeStep
from dtcp.torchtitan.stages import rows_of_micro_batch

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.distributed.utils import clip_grad_norm_
from torchtitan.models.common.decoder import Decoder

from dtcp.compile import compile_whole
from dtcp.mixer_metadata import batch_metadata
from dtcp.pretrain.batches import ahead_of, batch_documents, forward_names
from dtcp.pretrain.progress import say
from dtcp.pretrain.trainer import Trainer, share_router_losses

TOLERANCE = 1e-5
"""Largest relative difference of a loss; fp32 sums in another order differ by 1e-7 or so."""

SMALLEST = 1e-6
"""What a loss is compared with at least: one without a token is 0."""

GRADIENT_TOLERANCE = 1e-3
"""Largest relative difference of a weight's gradient, or of a thousandth of all gradients' norm."""

Weights = dict[str, Tensor]


def verify(config: Trainer.Config) -> int:
    """Run `config.dtcp.verify` steps twice and compare. Returns the exit code, on every rank."""
    config = _shortened(config)
    with float64_by_name():
        trainer = config.build()
    parts, pp = trainer.model_parts, trainer.mesh.pp
    state = {name: x for part in parts for name, x in part.state_dict().items()}
    weights = whole_tensors(state, pp)
    gradients = first_gradients(trainer.optimizers, parts, pp)
    try:
        trainer.train()
    finally:
        trainer.close()
    verdict = [128 + trainer.stopped_by] if trainer.stopped_by else [0]
    if dist.get_rank() == 0 and not trainer.stopped_by:
        say("again       on one device, from the same weights")
        with without_spmd_types():
            losses, expected = one_device_steps(trainer, weights)
        verdict = [
            _compare(trainer.metrics_processor.losses, losses)
            or _compare_gradients(gradients, expected)
        ]
    dist.broadcast_object_list(verdict, device=trainer.device)
    dist.destroy_process_group()
    return verdict[0]


def whole_tensors(tensors: Weights, pp: DeviceMesh | None = None) -> Weights:
    """Every tensor whole, on the host of rank 0; elsewhere the dict is empty.

    Args:
        pp: whose ranks have those of other stages.
    """
    group = None if pp is None else pp.get_group()
    # Those that rank 0 asks: one of each stage.
    asked = dist.get_rank() == 0 if group is None else 0 in dist.get_process_group_ranks(group)
    found = {}
    for name, value in tensors.items():
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        if asked:
            found[name] = whole.detach().cpu().clone()
    if not asked or group is None:
        return found
    of_stages: list[Any] | None = None
    if dist.get_rank() == 0:
        of_stages = [None] * dist.get_world_size(group)
    dist.gather_object(found, of_stages, dst=0, group=group)
    return {name: x for each in of_stages or () for name, x in each.items()}


def first_gradients(
    optimizers: Any, parts: Sequence[nn.Module], pp: DeviceMesh | None = None
) -> Weights:
    """What the optimizers are given in their first step, whole, by name; empty until then.

    A loss does not show a gradient that is wrong by a factor: AdamW steps as far.
    """
    found: Weights = {}
    steps = itertools.count()

    def keep(*_: Any, **__: Any) -> None:
        if next(steps):
            return
        named = [each for part in parts for each in part.named_parameters()]
        given = {name: x.grad for name, x in named if x.grad is not None}
        found.update({_unwrapped(name): x for name, x in whole_tensors(given, pp).items()})

    optimizers.register_step_pre_hook(keep)
    return found


def _unwrapped(name: str) -> str:
    """A parameter's name without what activation checkpointing and compile put into it."""
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


def one_device_steps(trainer: Trainer, weights: Weights) -> tuple[dict[int, float], Weights]:
    """Train a plain copy of the model over the trainer's rows.

    Returns:
        its loss by step, and its first gradients.
    """
    config, device = trainer.config, trainer.device
    model = _plain_model(config, weights, device)
    count = trainer.gradient_accumulation_steps * trainer.num_pipeline_parallel_microbatches
    share_router_losses(model, count)
    optimizers = config.optimizer.build(model_parts=[model])
    gradients = first_gradients(optimizers, [model])
    before_step = config.model_spec.post_optimizer_build_fn
    if isinstance(before_step, BeforeStep):
        before_step.register(optimizers, model, None)
    schedulers = config.lr_scheduler.build(
        optimizers=optimizers, training_steps=config.training.steps
    )
    batches = iter(
        config.dataloader.build(
            dp_world_size=1,
            dp_rank=0,
            tokenizer=trainer.tokenizer,
            seq_len=config.training.seq_len,
            local_batch_size=rows_of_micro_batch(config.training, config.parallelism)
            * trainer.mesh.size("batch"),
        )
    )
    losses = {}
    # Fewer than were asked for, where the data end before.
    for step in trainer.metrics_processor.losses:
        parts = [next(batches) for _ in range(count)]
        optimizers.zero_grad()
        losses[step] = _accumulate(trainer, model, parts)
        clip_grad_norm_(list(model.parameters()), config.training.max_norm, foreach=True)
        optimizers.step()
        schedulers.step()
    return losses, gradients


def _accumulate(
    trainer: Trainer, model: nn.Module, parts: list[tuple[dict[str, Any], Tensor]]
) -> float:
    """Gradients of the mean loss over the tokens of all parts; returns that mean."""
    count = sum((labels != IGNORE_INDEX).sum() for _, labels in parts).to(trainer.device)
    total = 0.0
    for batch, labels in parts:
        documents, position_ids = batch_documents(batch), batch["positions"].cpu()
        attn_metadata = batch_metadata(model, documents, position_ids=position_ids)
        further = ahead_of(model, batch["input"], labels, documents, training=True)
        names = forward_names(model)
        inputs = dict(zip(names, (position_ids, attn_metadata), strict=True))
        if further:
            inputs["mtp_input_ids"] = further["mtp_input_ids"]
            labels = torch.cat((labels[:, None], further["mtp_labels"]), dim=1)
        device = trainer.device
        logits = model(
            batch["input"].to(device), **{name: value.to(device) for name, value in inputs.items()}
        )
        labels = labels.to(trainer.device)
        loss, _ = trainer.loss_fn(logits, labels, count)
        loss.backward()
        total += float(loss.detach())
    return total


def _plain_model(
    config: Trainer.Config, weights: dict[str, Tensor], device: torch.device
) -> nn.Module:
    with torch.device(device):
        model = config.model_spec.model.build()
    # Buffers are not in a state dict; the weights it draws are overwritten.
    model.init_weights(buffer_device=device)
    if config.training.dtype == "float64":
        model.double()
    model.load_state_dict(weights)
    if isinstance(model, Decoder):
        add_mixers(model)
    if config.compile.enable:
        for block in model.layers.children():
            block.forward = compile_whole(block.forward, backend=config.compile.backend)
    return model.train()


def _shortened(config: Trainer.Config) -> Trainer.Config:
    """The same run, as far as its verified steps: in fp32, nothing loaded and nothing left.

    In fp64 with experts: of some thousand choices of experts rounding decides one every few steps,
    and the two runs would train different experts.
    """
    steps = config.dtcp.verify
    dtype = "float64" if getattr(config.model_spec.model, "num_experts", 0) else "float32"
    total = config.lr_scheduler.total_steps or config.training.steps
    return replace(
        config,
        # In bfloat16 two orders of a sum differ by more than any bug would.
        training=replace(
            config.training,
            steps=steps,
            dtype=dtype,
            mixed_precision_param=dtype,
            mixed_precision_reduce=dtype,
        ),
        lr_scheduler=replace(config.lr_scheduler, total_steps=total),
        checkpoint=replace(config.checkpoint, enable=False),
        validator=replace(config.validator, enable=False),
        metrics=replace(config.metrics, log_freq=1, enable_tensorboard=False),
        # The other ranks wait while the first one compiles and repeats.
        comm=replace(config.comm, train_timeout_seconds=3600),
    )


def _compare(actual: dict[int, float], expected: dict[int, float]) -> int:
    worst = 0.0
    for step, loss in expected.items():
        difference = abs(actual[step] - loss) / max(abs(loss), SMALLEST)
        # A comparison with NaN is false: a loss that is none agrees with nothing.
        worst = math.inf if math.isnan(difference) else max(worst, difference)
        say(f"step {step:>5}  mesh {actual[step]:.7f}  one device {loss:.7f}  {difference:.1e}")
    agrees = worst <= TOLERANCE
    say(
        f"verified    the losses of {len(expected)} steps agree to {worst:.1e}"
        if agrees
        else f"differs     by {worst:.1e}, more than {TOLERANCE}: this mesh computes another loss"
    )
    return 0 if agrees else 1


def _compare_gradients(actual: Weights, expected: Weights) -> int:
    total = math.hypot(*(float(x.norm()) for x in expected.values()))
    worst, where = 0.0, "none"
    if not expected:
        say("differs     one device has no gradient of its first step, which proves nothing")
        return 1
    for name in sorted(actual.keys() | expected.keys()):
        mine, its = (found.get(name, torch.zeros(())) for found in (actual, expected))
        size = max(float(its.norm()), GRADIENT_TOLERANCE * total, SMALLEST)
        fits = mine.shape == its.shape or not (mine.ndim and its.ndim)
        difference = float((mine - its).norm()) / size if fits else math.inf
        difference = math.inf if math.isnan(difference) else difference
        if difference > worst:
            worst, where = difference, name
    if worst <= GRADIENT_TOLERANCE:
        say(f"gradients   of the first step agree to {worst:.1e}")
        return 0
    say(
        f"differs     by {worst:.1e}, more than {GRADIENT_TOLERANCE}, in the first gradient of "
        f"{where}, as it is clipped: this mesh trains in another way"
    )
    return 1
