"""The tensor-parallel plan of a model of transformers, from the plan that transformers has for it.

transformers says a role for each module or pattern, "colwise" for example; each role is a style
here, and norms, routers and embeddings, of which its plans say nothing, have styles too.
"""

import logging
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel

from dtcp.distributed.dtensor_rules import HEADS
from dtcp.huggingface.config_fields import values_in_layers
from dtcp.huggingface.quantized import quantized_layers
from dtcp.huggingface.recurrent_layers import kernel_names, recurrent_layers
from dtcp.mixer_plan import matches
from dtcp.parallelize.plans.adapters import BASE, adapted, adapter_style, check_is_called
from dtcp.parallelize.plans.forward_code import (
    adds_in_place,
    has_parameters,
    reads_weights,
    reads_weights_elsewhere,
    reads_weights_in_a_method,
)
from dtcp.parallelize.plans.latent_heads import COLWISE, ROWWISE, WHOLE, latent_heads
from dtcp.parallelize.plans.recurrent_heads import recurrent_heads
from dtcp.parallelize.plans.splittable import check_splittable
from dtcp.parallelize.plans.units_by_trial import beside_experts, units_by_trial
from dtcp.parallelize.tensor_parallel import (
    HeadsOfLayer,
    HFExpertTensorParallel,
    LocalParams,
    ReplicatedParams,
    ReplicateInput,
    ReplicateInputWithSinks,
    RowwiseOwnOutput,
    ScaledVocabParallelEmbedding,
    VocabParallelEmbedding,
    WholeExperts,
    is_experts,
    why_not_known,
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

WRITES_LOGITS = ("chameleon",)
"""Families that set logits of some tokens, those of images, so that nobody predicts them."""

log = logging.getLogger(__name__)


def hf_tensor_plan(model: Any, tp: int) -> dict[str, ParallelStyle]:
    """transformers' own plan in our styles, with styles for all that it says nothing of.

    A part of a block (its attention, its feed-forward) is split if there is a style for each of
    its parameters; one that is not is whole on every rank of tp, and said to be.

    Raises:
        ValueError: a size that tp does not divide, or an adapter of a kind that it cannot split.
    """
    tp_plan = _tp_plan(model)
    _check_divisible(model, tp_plan, tp)
    check_splittable(model)
    parts = _Parts.of(model)
    modules, owners, units = parts.modules, parts.owners, parts.units
    roles = {name: _role(name, tp_plan) or _own_role(module) for name, module in modules.items()}
    latent_roles, containers = latent_heads(modules, tp)
    heads = recurrent_heads(model, modules, tp)
    heads = {name: style for name, style in heads.items() if units[name] not in parts.quantized}
    roles |= latent_roles
    _, missing = _styles(model, parts, roles, heads, tp)
    beside = beside_experts(modules, roles, EXPERTS)
    to_try = [unit for unit in missing if unit not in parts.quantized]
    tried = units_by_trial(model, modules, owners, to_try, beside, tp)
    tried = {name: style for name, style in tried.items() if units[name] not in parts.quantized}
    heads |= tried
    roles |= dict.fromkeys((name for name in owners if adapted(name)[0] in tried), "")
    plan, missing = _styles(model, parts, roles, heads, tp)
    for name in owners:
        if units[name] in missing and roles[name] != EXPERTS:
            plan[name] = _whole(modules[name])
    plan |= {name: style for name, style in containers.items() if units[name] not in missing}
    of_heads = {name: style for name, style in heads.items() if isinstance(style, HeadsOfLayer)}
    plan |= {name: style for name, style in of_heads.items() if units[name] not in missing}
    # These read the weights of modules inside of them.
    recurrent = {*recurrent_layers(model)} - {modules[name] for name in heads}
    plan |= {name: LocalParams() for name in modules if modules[name] in recurrent}
    whole = {name for name in owners if plan[name] == LocalParams()}
    readers = (name for name in modules if name and _reads_weights(name, modules, whole))
    plan |= {name: LocalParams() for name in readers if name not in plan}
    _say_what_is_whole(missing, modules, tp)
    by_role = {name: style for name, style in plan.items() if name not in heads}
    return {**_shared_inputs(by_role), **plan}


@dataclass(frozen=True)
class _Parts:
    """The modules of a model, by name, and the parts of its blocks.

    Args:
        owners: names of the modules that have parameters of their own.
        units: of each module, the part of a block that is split as one.
        quantized: units with a layer whose weight is quantized, or that has modules inside, as
            torchao's of rounded weights, with its name: they stay whole.
    """

    modules: dict[str, nn.Module]
    owners: list[str]
    units: dict[str, str]
    quantized: dict[str, str]

    @classmethod
    def of(cls, model: nn.Module) -> "_Parts":
        modules = dict(model.named_modules())
        owners = [name for name, module in modules.items() if has_parameters(module)]
        units = {name: _unit(name, modules) for name in modules}
        # torch's styles take each module inside of a linear layer for a linear layer, too.
        linear = (name for name, module in modules.items() if isinstance(module, nn.Linear))
        nested = [name for name in linear if any(modules[name].children())]
        quantized = {units[name]: name for name in reversed([*quantized_layers(model), *nested])}
        return cls(modules, owners, units, quantized)


def _styles(
    model: Any, parts: _Parts, roles: Mapping[str, str], heads: Mapping[str, ParallelStyle], tp: int
) -> tuple[dict[str, ParallelStyle], dict[str, str]]:
    """The style of each module that has parameters; and parts of which one has none, with it."""
    modules, owners, units = parts.modules, parts.owners, parts.units
    experts = tuple(name for name in modules if roles[name] == EXPERTS)
    moes = tuple(f"{name.rpartition('.')[0]}." for name in experts)
    split_units = {units[name] for name in owners if roles[adapted(name)[0]] == COLWISE}
    plan: dict[str, ParallelStyle] = {}
    missing = dict(parts.quantized)
    for name in owners:
        if units[name] in parts.quantized:
            plan[name] = LocalParams()
            continue
        target, part = adapted(name)
        beside = f"{name}.".startswith(moes) and not name.startswith(experts)
        split = heads.get(target) or _style(
            model,
            target,
            modules[target if part else name],
            modules[f"{target}.{BASE}"] if part else modules[name],
            roles[target],
            tp,
            beside_experts=beside,
        )
        if isinstance(split, RowwiseParallel) and adds_in_place(modules, target, units[target]):
            split = RowwiseOwnOutput()
        check_is_called(target, modules[target], split)
        style = adapter_style(split, target, part) if part else _checked(name, modules[name], split)
        if isinstance(style, ReplicatedParams) and not roles[target] and units[name] in split_units:
            style = None  # A norm of all heads, of which a rank would have some.
        if style is None:
            missing.setdefault(units[name], name)
        plan[name] = style or _whole(modules[name])
    return plan, missing


def _whole(module: nn.Module) -> ParallelStyle:
    """The style of what each rank has whole; experts run by the joined form of their weights."""
    return WholeExperts() if is_experts(module) else LocalParams()


def _unit(name: str, modules: Mapping[str, nn.Module]) -> str:
    """The part of a block that a module belongs to: up to what follows the first number.

    Where that is a list of parts (T5), each of which holds a norm beside what is split, it is up to
    what follows the second.
    """
    match = re.match(r"(.*?\.\d+\.[^.]+)", name)
    if match is None:
        return name
    listed = re.match(re.escape(match.group(1)) + r"(\.\d+)\.[^.]+", name)
    if listed is None or not isinstance(modules[match.group(1)], nn.ModuleList):
        return match.group(1)
    entry = modules[match.group(1) + listed.group(1)]
    holds_layers = any(hasattr(each, "in_features") for each in entry.children())
    return match.group(1) if holds_layers else listed.group(0)


def _reads_weights(name: str, modules: Mapping[str, nn.Module], whole: Collection[str]) -> bool:
    """Whether a module reads the weight of one inside of it: in forward, or for parts that are all
    whole in a method of its own, as towers do that stretch a table of positions over an image."""
    module = modules[name]
    owners = (
        each for each in modules if each.startswith(f"{name}.") and has_parameters(modules[each])
    )
    return reads_weights(module) or (
        reads_weights_in_a_method(module) and all(each in whole for each in owners)
    )


def _say_what_is_whole(
    missing: Mapping[str, str], modules: Mapping[str, nn.Module], tp: int
) -> None:
    kinds: dict[str, str] = {}
    for unit, name in missing.items():
        pattern = re.sub(r"\.\d+(?=\.|$)", ".*", unit)
        kinds.setdefault(pattern, f"{name} ({type(modules[name]).__name__})")
    for pattern, name in kinds.items():
        log.warning("%s is whole on each of %d tp ranks: no style splits %s.", pattern, tp, name)


def _shared_inputs(plan: Mapping[str, ParallelStyle]) -> dict[str, ParallelStyle]:
    """What several projections read becomes a DTensor once: its gradient is reduced once."""
    # A layer and its adapters are one projection.
    split = {adapted(name)[0] for name, each in plan.items() if isinstance(each, ColwiseParallel)}
    parents = [name.rpartition(".")[0] for name in split]
    # A module that keeps its parameters whole hands its parts what it was handed.
    return {
        parent: ReplicateInput()
        for parent in parents
        if parent and parents.count(parent) > 1 and parent not in plan
    }


def _tp_plan(model: Any) -> Mapping[str, str]:
    """Roles by module name or pattern, in transformers' terms."""
    return TP_PLANS.get(model.config.model_type, model.tp_plan or {})


def _role(name: str, tp_plan: Mapping[str, str]) -> str:
    return next((role for key, role in tp_plan.items() if matches(name, key)), "")


def _own_role(module: nn.Module) -> str:
    """That of a module which its model's plan says nothing of, where it is known what it computes:
    experts say themselves how their weights are laid out."""
    return EXPERTS if is_experts(module) and not why_not_known(module) else ""


def _style(
    model: Any,
    name: str,
    owner: nn.Module,
    module: nn.Module,
    role: str,
    tp: int,
    *,
    beside_experts: bool,
) -> ParallelStyle | None:
    """The style of a module; its owner is the adapted layer that holds it, or itself."""
    head = model.get_output_embeddings()
    is_end = owner is head or _looks_tokens_up(model, owner)
    if head is not None and is_end and (_has_bias_around_head(model) or _writes_logits(model)):
        return LocalParams()
    if _looks_tokens_up(model, owner):
        return (
            VocabParallelEmbedding()
            if type(module) is nn.Embedding
            else ScaledVocabParallelEmbedding()
        )
    if owner is model.get_output_embeddings():
        return ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
    if _is_bias_of_head(model, module):
        return LocalParams(Shard(0))
    if role == EXPERTS:
        return _experts_style(name, module, tp)
    if role == SINKS:
        return ReplicateInputWithSinks()
    if role == "replicated_with_grad_allreduce":
        return ReplicatedParams(Shard(HEADS))
    if role in (COLWISE, ROWWISE):
        return ColwiseParallel() if role == COLWISE else RowwiseParallel()
    if role == WHOLE:
        return LocalParams()
    on_top = "." not in name and module is not model.base_model
    if (beside_experts or on_top) and not role:
        # A router, a shared expert that the plan does not split, or the head of a classifier: on
        # whole activations.
        return LocalParams()
    shapes = [p.ndim for p in module.parameters(recurse=False)]
    is_norm = set(shapes) == {1} and "Norm" in type(module).__name__
    return ReplicatedParams() if is_norm and not role else None


def _looks_tokens_up(model: Any, module: nn.Module) -> bool:
    """Whether a module is the model's embedding, or one of its weight, or of the head's.

    Encoders and decoders have their own.
    """
    embedding = model.get_input_embeddings()
    if module is embedding or not isinstance(module, nn.Embedding):
        return module is embedding
    ends = (embedding, model.get_output_embeddings())
    return any(module.weight is getattr(end, "weight", None) for end in ends)


def _is_bias_of_head(model: Any, module: nn.Module) -> bool:
    """Whether a module holds nothing but what the head holds as well, as those of BERT do."""
    head = model.get_output_embeddings()
    shared = set() if head is None else set(head.parameters(recurse=False))
    return all(p in shared for p in module.parameters(recurse=False))


def _checked(name: str, module: nn.Module, style: ParallelStyle | None) -> ParallelStyle | None:
    """Refuse a module that is not called, or not only: no style would see it."""
    if "NotImplementedError" in kernel_names(module) or reads_weights_elsewhere(module):
        raise ValueError(
            f"Tensor parallelism gives a module its parameters where it is called, got {name} "
            f"({type(module).__name__}), whose other methods are: set tp=1 and give the ranks to "
            f"cp."
        )
    return style


def _has_bias_around_head(model: Any) -> bool:
    """Whether the module around the head adds numbers of its own to all of its outputs."""
    head = model.get_output_embeddings()
    if any(x.shape[-1:] == head.weight.shape[:1] for x in model.buffers(recurse=False)):
        return True
    name = next((name for name, module in model.named_modules() if module is head), "")
    parent = model.get_submodule(name.rpartition(".")[0])
    own = set(parent.parameters(recurse=False))
    return parent is not model and not own <= set(head.parameters(recurse=False))


def _writes_logits(model: Any) -> bool:
    """Whether a model writes numbers of its own over its logits, which no part of them takes."""
    return getattr(model.config, "model_type", "") in WRITES_LOGITS


def _experts_style(name: str, module: nn.Module, tp: int) -> ParallelStyle:
    reason = why_not_split(module, tp)
    if not reason:
        return HFExpertTensorParallel()
    log.warning("%s is whole on each of %d tp ranks: %s.", name, tp, reason)
    return WholeExperts()


def _check_divisible(model: Any, tp_plan: Mapping[str, str], tp: int) -> None:
    config = model.config.get_text_config()
    sizes = {"vocab_size": config.vocab_size}
    ends = {"embedding": model.get_input_embeddings(), "head": model.get_output_embeddings()}
    # They may have rows for more tokens than the vocabulary says.
    sizes |= {
        f"the rows of the {name}": module.weight.shape[0]
        for name, module in ends.items()
        if module is not None
    }
    for key in ("num_attention_heads", "num_key_value_heads"):
        if "colwise" in tp_plan.values():
            # The first that tp does not divide, where layers have numbers of their own.
            sizes[key] = next((x for x in values_in_layers(config, key) if x % tp), tp)
    for name, module in model.named_modules():
        name, part = adapted(name)
        if isinstance(module, nn.Linear) and part in ("", BASE):
            role = _role(name, tp_plan)
            size = {"colwise": module.out_features, "rowwise": module.in_features}.get(role, tp)
            sizes[f"the width of {name}"] = size
    for name, size in sizes.items():
        if size % tp:
            raise ValueError(
                f"Tensor parallelism splits {name} into equal parts, got {size} with tp={tp}: "
                f"choose a tp that divides it, and give the ranks to cp instead."
            )
