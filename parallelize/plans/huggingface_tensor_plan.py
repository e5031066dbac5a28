"""The tensor-parallel plan of a model of transformers, from the plan that transformers has for it.

transformers says a role for each module or pattern, "colwise" for example; each role is a style
here, and norms, routers and embeddings, of which its plans say nothing, have styles too.
"""

import logging
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel

from dtcp.distributed.dtensor_rules import HEADS
from dtcp.mixer_plan import matches
from dtcp.parallelize.tensor_parallel import (
    HFExpertTensorParallel,
    LocalParams,
    ReplicatedParams,
    ReplicateInput,
    ReplicateInputWithSinks,
    ScaledVocabParallelEmbedding,
    VocabParallelEmbedding,
    WholeExperts,
    why_not_split,
)

EXPERTS, SINKS = "moe_tp_experts", "sinks"

TP_PLANS: Mapping[str, Mapping[str, str]] = {
    "gpt_oss": {
        "model.layers.*.self_attn": SINKS,
        "model.layers.*.self_attn.q_proj": "colwise",
        "model.layers.*.self_attn.k_proj": "colwise",
        "model.layers.*.self_attn.v_proj": "colwise",
        "model.layers.*.self_attn.o_proj": "rowwise",
        "model.layers.*.mlp.experts": EXPERTS,
    },
}
"""Tensor-parallel plans in transformers' terms, for families that it has none for."""

log = logging.getLogger(__name__)


def hf_tensor_plan(model: Any, tp: int) -> dict[str, ParallelStyle]:
    """transformers' own plan in our styles, with styles for norms and routers added.

    Raises:
        ValueError: a parameter without a style, or a size that tp does not divide.
    """
    tp_plan = _tp_plan(model)
    _check_divisible(model, tp_plan, tp)
    modules = dict(model.named_modules())
    roles = {name: _role(name, tp_plan) for name in modules}
    experts = tuple(name for name, role in roles.items() if role == EXPERTS)
    moes = tuple(f"{name.rpartition('.')[0]}." for name in experts)
    plan: dict[str, ParallelStyle] = {}
    for name, module in modules.items():
        parameters = [key for key, _ in module.named_parameters(recurse=False)]
        if not parameters:
            continue
        beside_experts = name.startswith(moes) and not name.startswith(experts)
        style = _style(model, name, module, roles[name], tp, beside_experts=beside_experts)
        if style is None:
            raise ValueError(
                f"Tensor parallelism needs a style for each parameter, got {parameters} of {name} "
                f"({type(module).__name__}) with the role {roles[name]!r} in transformers' plan: "
                f"set tp=1 and give the ranks to cp, or pass a ParallelPlan to parallelize."
            )
        plan[name] = style
    parents = [
        name.rpartition(".")[0]
        for name, style in plan.items()
        if isinstance(style, ColwiseParallel)
    ]
    # What several projections read becomes a DTensor once, so that its gradient is reduced once.
    shared_inputs = {
        parent: ReplicateInput() for parent in parents if parent and parents.count(parent) > 1
    }
    return {**shared_inputs, **plan}


def _tp_plan(model: Any) -> Mapping[str, str]:
    """Roles by module name or pattern, in transformers' terms."""
    tp_plan: Mapping[str, str] = TP_PLANS.get(model.config.model_type, model.tp_plan)
    if not any("layers" in key for key in tp_plan):
        raise ValueError(
            f"Tensor parallelism follows the plan that transformers has of a model, got none for "
            f"the layers of {type(model).__name__}: set tp=1 and give the ranks to cp, or pass a "
            f"ParallelPlan to parallelize."
        )
    return tp_plan


def _role(name: str, tp_plan: Mapping[str, str]) -> str:
    return next((role for key, role in tp_plan.items() if matches(name, key)), "")


def _style(
    model: Any, name: str, module: nn.Module, role: str, tp: int, *, beside_experts: bool
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
    on_top = "." not in name and module is not model.base_model
    if (beside_experts or on_top) and not role:
        # A router, a shared expert that the plan does not split, or the head of a classifier: on
        # whole activations.
        return LocalParams()
    shapes = [p.ndim for p in module.parameters(recurse=False)]
    is_norm = set(shapes) == {1} and "Norm" in type(module).__name__
    return ReplicatedParams() if is_norm and not role else None


def _experts_style(name: str, module: nn.Module, tp: int) -> ParallelStyle:
    reason = why_not_split(module, tp)
    if not reason:
        return HFExpertTensorParallel()
    log.warning("%s is whole on each of %d tp ranks: %s.", name, tp, reason)
    return WholeExperts()


def _check_divisible(model: Any, tp_plan: Mapping[str, str], tp: int) -> None:
    config = model.config.get_text_config()
    sizes = {"vocab_size": config.vocab_size, "num_attention_heads": config.num_attention_heads}
    kv_heads = getattr(config, "num_key_value_heads", None)
    sizes["num_key_value_heads"] = kv_heads or config.num_attention_heads
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            role = _role(name, tp_plan)
            size = {"colwise": module.out_features, "rowwise": module.in_features}.get(role, tp)
            sizes[f"the width of {name}"] = size
    for name, size in sizes.items():
        if size % tp:
            raise ValueError(
                f"Tensor parallelism splits {name} into equal parts, got {size} with tp={tp}: "
                f"choose a tp that divides it, and give the ranks to cp instead."
            )
