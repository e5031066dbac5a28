"""Any causal language model of transformers, by one call.

The plan is read off the model: mixers from a survey of its attention, blocks from where its
attention modules stand, tensor parallelism from the plan that transformers keeps of it.
"""

import logging
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel

from dtcp.distributed.dtensor_rules import HEADS
from dtcp.distributed.mesh import ParallelMesh
from dtcp.huggingface import Survey, install_mixers
from dtcp.huggingface.registry import MIXER
from dtcp.parallelize.activation_checkpoint import ActivationCheckpoint
from dtcp.parallelize.apply import (
    KEEP_ALL,
    PLAIN_FSDP,
    ParallelPlan,
    parallelize,
)
from dtcp.parallelize.compile import Compile
from dtcp.parallelize.fsdp import FSDP
from dtcp.parallelize.plans.huggingface_experts import ExpertChannels, Whole, why_not_split
from dtcp.parallelize.tensor_parallel import (
    ReplicatedParams,
    ReplicateInput,
    ReplicateInputWithSinks,
    ScaledVocabParallelEmbedding,
    VocabParallelEmbedding,
)
from dtcp.plan import matches
from dtcp.softmax import RingAttention
from dtcp.softmax.style import AttentionStyle

RING = RingAttention()
EXPERTS, SINKS = "moe_tp_experts", "sinks"

PLANS: Mapping[str, Mapping[str, str]] = {
    "gpt_oss": {
        "model.layers.*.self_attn": SINKS,
        "model.layers.*.self_attn.q_proj": "colwise",
        "model.layers.*.self_attn.k_proj": "colwise",
        "model.layers.*.self_attn.v_proj": "colwise",
        "model.layers.*.self_attn.o_proj": "rowwise",
        "model.layers.*.mlp.experts": EXPERTS,
    },
}
"""In transformers' terms, for families of which it has no plan."""

log = logging.getLogger(__name__)


def parallelize_hf(
    model: Any,
    mesh: ParallelMesh,
    attention: AttentionStyle | Callable[[str], AttentionStyle] = RING,
    *,
    activation_checkpoint: ActivationCheckpoint = KEEP_ALL,
    compile: Compile | None = None,
    fsdp: FSDP = PLAIN_FSDP,
) -> Any:
    """Put an unmodified model of transformers on FSDP x TP x CP, in place.

    Batches come from shard_hf_batch, and the loss is token_mean_loss: gradients are sums over
    ranks, and under tp logits are a DTensor sharded in the vocabulary.

    Args:
        model: on a real device, with its weights; or on the meta device: load_hf follows.
        attention: the strategy of every attention module, or a function of the module's name.
    Raises:
        ValueError: what the model needs and nobody here can give, by the names of the layers; or
            weights that are not the same on all ranks.
    """
    _check_alike(model, mesh)
    found = install_mixers(model)
    _let_experts_compile(model, compile)
    plan = hf_plan(model, found, mesh, attention)
    return parallelize(
        model, mesh, plan, activation_checkpoint=activation_checkpoint, compile=compile, fsdp=fsdp
    )


def hf_plan(
    model: Any,
    found: Survey,
    mesh: ParallelMesh,
    attention: AttentionStyle | Callable[[str], AttentionStyle],
) -> ParallelPlan:
    """The plan of a model that has its mixers.

    Raises:
        ValueError: tp is asked for, and something has no style or does not divide.
    """
    names = [each.name for each in found.attentions]
    styles = {
        f"{name}.{MIXER}": attention if isinstance(attention, AttentionStyle) else attention(name)
        for name in names
    }
    return ParallelPlan(
        tp=tensor_plan(model, mesh.size("tp")) if mesh.tp is not None else {},
        cp=styles,
        blocks=tuple(dict.fromkeys(_block(name) for name in names)),
        fsdp_units=_units(model),
        islands=_islands(model),
    )


def tensor_plan(model: Any, tp: int) -> dict[str, ParallelStyle]:
    """transformers' own plan in our styles; norms run per token, and nothing is left over."""
    asked = _asked(model)
    _check_divisible(model, asked, tp)
    modules = dict(model.named_modules())
    roles = {name: _role(name, asked) for name in modules}
    experts = tuple(name for name, role in roles.items() if role == EXPERTS)
    mixtures = tuple(f"{name.rpartition('.')[0]}." for name in experts)
    plan: dict[str, ParallelStyle] = {}
    for name, module in modules.items():
        own = [key for key, _ in module.named_parameters(recurse=False)]
        if not own:
            continue
        in_mixture = name.startswith(mixtures) and not name.startswith(experts)
        style = _style(model, name, module, roles[name], tp, in_mixture=in_mixture)
        if style is None:
            raise ValueError(
                f"Tensor parallelism needs a style for each parameter, got {own} of {name} "
                f"({type(module).__name__}) with the role {roles[name]!r} in transformers' plan: "
                f"set tp=1 and give the ranks to cp, or pass a ParallelPlan to parallelize."
            )
        plan[name] = style
    columns = [name.rpartition(".")[0] for name in plan if _is_columns(plan[name])]
    # What several projections read enters once, so that its gradient is reduced once.
    shared = {
        parent: ReplicateInput() for parent in columns if parent and columns.count(parent) > 1
    }
    return {**shared, **plan}


def _check_alike(model: nn.Module, mesh: ParallelMesh) -> None:
    """Refuse a model that ranks have made differently: shards of it would fit no whole."""
    if mesh.degrees.world == 1 or next(model.parameters()).is_meta:
        return
    sums = [p.detach().sum(dtype=torch.float64) for p in model.parameters()]
    found = torch.stack([*sums, sums[0].new_tensor(len(sums))]).to(mesh.device_mesh.device_type)
    bounds = torch.stack((found, -found)).nan_to_num()
    highest = bounds.clone()
    for group in mesh.device_mesh.get_all_groups():
        dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
    if not torch.equal(highest[0], -highest[1]):
        raise ValueError(
            f"Ranks hold the same weights before they are sharded, got a {type(model).__name__} "
            f"whose weights differ: seed all ranks alike, or load the same checkpoint."
        )


def _let_experts_compile(model: Any, compile: Compile | None) -> None:
    """Take transformers' loop over the experts that were hit out of what is to be one graph."""
    asked = getattr(model.config, "_experts_implementation", None)
    if compile is not None and asked == "eager" and model._can_set_experts_implementation():
        log.warning(
            "Experts of %s are computed by grouped_mm, for a loop over those that were hit has no "
            "graph: set experts_implementation to choose another.",
            type(model).__name__,
        )
        model.set_experts_implementation("grouped_mm")


def _asked(model: Any) -> Mapping[str, str]:
    asked: Mapping[str, str] = PLANS.get(model.config.model_type, model.tp_plan)
    if not any("layers" in key for key in asked):
        raise ValueError(
            f"Tensor parallelism follows the plan that transformers has of a model, got none for "
            f"the layers of {type(model).__name__}: set tp=1 and give the ranks to cp, or pass a "
            f"ParallelPlan to parallelize."
        )
    return asked


def _role(name: str, asked: Mapping[str, str]) -> str:
    return next((role for key, role in asked.items() if matches(name, key)), "")


def _style(
    model: Any, name: str, module: nn.Module, role: str, tp: int, *, in_mixture: bool
) -> ParallelStyle | None:
    if module is model.get_input_embeddings():
        return (
            VocabParallelEmbedding()
            if type(module) is nn.Embedding
            else ScaledVocabParallelEmbedding()
        )
    if module is model.get_output_embeddings():
        return ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
    if role == EXPERTS:
        return _experts_style(name, module, tp)
    if role == SINKS:
        return ReplicateInputWithSinks()
    if role == "replicated_with_grad_allreduce":
        return ReplicatedParams(Shard(HEADS))
    if role in ("colwise", "rowwise"):
        return ColwiseParallel() if role == "colwise" else RowwiseParallel()
    if in_mixture and not role:
        # A router, or a shared expert nobody splits: beside the experts, on whole activations.
        return Whole()
    shapes = [p.ndim for p in module.parameters(recurse=False)]
    is_norm = set(shapes) == {1} and "Norm" in type(module).__name__
    return ReplicatedParams() if is_norm and not role else None


def _experts_style(name: str, module: nn.Module, tp: int) -> ParallelStyle:
    why_not = why_not_split(module, tp)
    if not why_not:
        return ExpertChannels()
    log.warning("%s is whole on each of %d tp ranks: %s.", name, tp, why_not)
    return Whole()


def _check_divisible(model: Any, asked: Mapping[str, str], tp: int) -> None:
    config = model.config.get_text_config()
    sizes = {"vocab_size": config.vocab_size, "num_attention_heads": config.num_attention_heads}
    sizes["num_key_value_heads"] = config.num_key_value_heads or config.num_attention_heads
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            role = _role(name, asked)
            size = {"colwise": module.out_features, "rowwise": module.in_features}.get(role, tp)
            sizes[f"the width of {name}"] = size
    for name, size in sizes.items():
        if size % tp:
            raise ValueError(
                f"Tensor parallelism splits {name} into equal parts, got {size} with tp={tp}: "
                f"choose a tp that divides it, and give the ranks to cp instead."
            )


def _is_columns(style: ParallelStyle) -> bool:
    return isinstance(style, ColwiseParallel)


def _block(name: str) -> str:
    """The repeated part an attention module stands in: up to the first number in its name."""
    found = re.match(r"(.*?)\.\d+(?=\.|$)", name)
    if found is None:
        raise ValueError(
            f"Blocks are the entries of a list of layers, got the attention module {name!r}, "
            f"which stands in none: pass a ParallelPlan to parallelize."
        )
    return f"{found.group(1)}.*"


def _islands(model: Any) -> tuple[str, ...]:
    """What transformers itself loads in fp32, whatever dtype it is asked for."""
    strict = model._keep_in_fp32_modules_strict
    found = re.compile("|".join(key.replace("*", ".*") for key in sorted(strict)))
    return tuple(name for name, _ in model.named_parameters() if strict and found.search(name))


def _units(model: Any) -> tuple[tuple[str, ...], ...]:
    """Embedding and head each gathered alone; a weight they share, with the rest of the model."""
    names = {module: name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or embedding.weight is head.weight:
        return ()
    return (names[embedding],), (names[head],)
