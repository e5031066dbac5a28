"""Any causal language model of transformers, by one call.

The plan is read off the model: mixers from a survey of its attention, blocks from the lists that
hold its attention modules, tensor parallelism from the plan that transformers has for it.
"""

import logging
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ParallelStyle

from dtcp.distributed.mesh import ParallelMesh, check_no_stages, check_parallel_mesh
from dtcp.distributed.refused_alike import refused_alike
from dtcp.huggingface import Survey, install_mixers
from dtcp.huggingface.expert_capacity import PositionInExpertCP
from dtcp.huggingface.images import CUT, CutRowsCP
from dtcp.huggingface.install import check_has_no_mixers
from dtcp.huggingface.joined_rows import JoinRowsCP
from dtcp.huggingface.last_token import LastTokenCP
from dtcp.huggingface.latents import exchange_latents, hands_on_latents
from dtcp.huggingface.picking_attention import INDEXER
from dtcp.huggingface.quantized import (
    keep_unpacked,
    quantized_layers,
    tensors_held,
    weights_kept_whole,
    whole_in_words,
)
from dtcp.huggingface.registry import MIXER, PROJECTION
from dtcp.huggingface.stages import HFStage
from dtcp.huggingface.token_dropouts import note_batches, split_over_tp
from dtcp.huggingface.whole_weights import refuse_merging, refuse_whole_weights
from dtcp.huggingface.zero_experts import compute_without_loop
from dtcp.mixer import Mixer
from dtcp.mixer_plan import find
from dtcp.parallelize.activation_checkpoint import ActivationCheckpoint
from dtcp.parallelize.apply import KEEP_ALL, PLAIN_FSDP, ParallelPlan, parallelize
from dtcp.parallelize.compile import Compile
from dtcp.parallelize.fsdp import FSDP
from dtcp.parallelize.hf_experts import (
    check_experts_without_adapters,
    hf_expert_plan,
    tell_experts_of_padding,
)
from dtcp.parallelize.plans.adapters import adapted_model
from dtcp.parallelize.plans.huggingface_tensor_plan import hf_tensor_plan
from dtcp.parallelize.plans.mixer_styles import mixer_styles
from dtcp.parallelize.stage_plan import plan_of_hf_stage
from dtcp.parallelize.tensor_parallel import LatentHeads, LocalParams, separate_gate_and_up
from dtcp.parallelize.tied_parameters import (
    TiedParameters,
    find_tied_parameters,
    units_across_blocks,
)
from dtcp.recurrent import (
    CausalConv1d,
    CausalConvCP,
    GatedDeltaCP,
    GatedDeltaRule,
    GatedLinearAttention,
    GatedLinearCP,
)
from dtcp.sequence.arguments import check_kind
from dtcp.softmax.default import default_attention, device_type_of
from dtcp.softmax.style import AttentionStyle
from dtcp.style import MixerStyle

RECURRENT: Mapping[type[Mixer], MixerStyle] = {
    CausalConv1d: CausalConvCP(),
    GatedDeltaRule: GatedDeltaCP(),
    GatedLinearAttention: GatedLinearCP(),
}
"""How the mixers of recurrent layers are carried out."""

log = logging.getLogger(__name__)


def parallelize_hf(
    model: Any,
    mesh: ParallelMesh,
    attention: AttentionStyle | Callable[[str], AttentionStyle] | None = None,
    *,
    activation_checkpoint: ActivationCheckpoint = KEEP_ALL,
    compile: Compile | None = None,
    fsdp: FSDP = PLAIN_FSDP,
    expert_exchange: str = "auto",
    shared_prompts: bool = False,
    stage: HFStage | None = None,
) -> Any:
    """Put an unmodified model of transformers on FSDP x TP x CP, in place.

    Batches come from shard_hf_batch, and the loss is token_mean_loss: gradients are sums over
    ranks, and under tp a language model's logits are a DTensor sharded in the vocabulary. A head of
    rows (of the last token, a mean) gives its outputs on every rank of cp.

    Args:
        model: on a real device, with its weights; or on the meta device: load_hf follows. Or a
            PeftModel around one, whose adapters are sharded beside the layers that they adapt.
        attention: the strategy of every attention module, or a function of the module's name;
            None for `default_attention`. Layers of multi-head latent attention exchange latents by
            RingAttention, AllGatherAttention and HaloAttention, and by others keys and values made
            of them. Given one of the first two, SparseLatentCP carries out layers whose tokens an
            indexer picks (DeepSeek-V3.2), CompressedSparseCP those with entries (V4).
        expert_exchange: what carries tokens on a mesh with an axis ep, as of ExpertParallel.
        shared_prompts: let WholeRows, and so trainers, compute once what several rows begin with.
        stage: on a mesh with an axis pp, what the model is to keep of itself (docs/pipeline.md).
    Raises:
        ValueError: what no mixer here does, by layer; weights that differ between ranks.
    """
    check_kind("parallelize_hf", nn.Module, model=model)
    _check_options(mesh, attention, stage, shared_prompts=shared_prompts)
    outer = model
    with refused_alike("A model is sharded", mesh.device_mesh):
        model = adapted_model(model)
        check_has_no_mixers(model)
        check_experts_without_adapters(model)
        _check_whole_weights(model, mesh)
    _check_same_weights(model, mesh)
    with refused_alike("A model is sharded", mesh.device_mesh):
        survey = install_mixers(model, shared_prompts=shared_prompts)
    _keep_quantized_whole(outer, model)
    _make_experts_compilable(model, compile)
    separate_gate_and_up(model)
    attention = attention or default_attention(device_type_of(mesh.cp))
    plan = hf_plan(model, survey, mesh, attention, expert_exchange)
    tell_experts_of_padding(model, find(model, plan.blocks), plan.ep)
    share_latents(model, survey, mesh, plan)
    plan = plan if stage is None else plan_of_hf_stage(plan, outer, stage)
    if mesh.tp is not None:
        split_over_tp(model, mesh.tp)
    parallelize(
        model, mesh, plan, activation_checkpoint=activation_checkpoint, compile=compile, fsdp=fsdp
    )
    note_batches(model, set(find(model, plan.blocks).values()))
    refuse_whole_weights(model)
    refuse_whole_weights(outer)
    return outer


def hf_plan(
    model: Any,
    survey: Survey,
    mesh: ParallelMesh,
    attention: AttentionStyle | Callable[[str], AttentionStyle],
    expert_exchange: str = "auto",
) -> ParallelPlan:
    """The plan of a model that has its mixers.

    Raises:
        ValueError: the mesh has an axis tp, and a parameter has no style or tp does not divide it.
    """
    names = [attention_module.name for attention_module in survey.attentions]
    styles: dict[str, ParallelStyle] = {}
    for each in survey.attentions:
        given = attention if isinstance(attention, AttentionStyle) else _of(attention, each.name)
        picks = hasattr(model.get_submodule(each.name), INDEXER)
        styles |= mixer_styles(each, given, picks=picks)
    styles |= {each.name: RECURRENT[each.kind] for each in survey.recurrent}
    names += [each.name for each in survey.recurrent]
    styles |= {each.name: PositionInExpertCP() for each in survey.capacity}
    if survey.images:
        styles[f"{survey.images}.{CUT}"] = CutRowsCP()
    if survey.pooled_head is not None:
        styles[f"{survey.pooled_head.name}.{MIXER}"] = LastTokenCP()
    styles |= {head.mixer: JoinRowsCP() for head in survey.row_heads}
    experts = hf_expert_plan(model, mesh, expert_exchange)
    tp = _without(experts, hf_tensor_plan(model, mesh.size("tp"))) if mesh.tp is not None else {}
    _check_picked_latents(survey, mesh, tp)
    blocks = tuple(dict.fromkeys(_block(name) for name in names))
    across = units_across_blocks(find_tied_parameters(model), list(find(model, blocks)))
    return ParallelPlan(
        tp=tp,
        ep=experts,
        cp=styles,
        blocks=blocks,
        fsdp_units=(*across, *_fsdp_units(model)),
        keep_dtype=_keep_dtype(model),
    )


def _check_options(
    mesh: ParallelMesh, attention: Any, stage: HFStage | None, *, shared_prompts: bool
) -> None:
    """Refuse an axis pp without a stage, and a strategy's name or class in the place of one."""
    check_parallel_mesh("parallelize_hf", mesh)
    check_kind("parallelize_hf", (HFStage, type(None)), stage=stage)
    if stage is None or shared_prompts:  # which are for trainers, whose models are whole
        check_no_stages("parallelize_hf", mesh.degrees)
    if attention is None or isinstance(attention, AttentionStyle):
        return
    if isinstance(attention, type) or not callable(attention):
        raise TypeError(
            f"parallelize_hf takes a strategy, or a function of a module's name that gives one, "
            f"got attention={attention!r}: give RingAttention(), say."
        )


def _of(attention: Callable[[str], AttentionStyle], name: str) -> AttentionStyle:
    """The strategy of a module by a function of its name."""
    style = attention(name)
    check_kind(f"The attention of {name}", AttentionStyle, style=style)
    return style


def share_latents(model: Any, survey: Survey, mesh: ParallelMesh, plan: ParallelPlan) -> None:
    """Let layers of latent attention exchange latents, where their strategy brings these.

    Under tp each of its ranks brings latents once, of which it makes the keys of its own heads.
    """
    if mesh.cp is None:
        return
    for surveyed in survey.attentions:
        attention = model.get_submodule(surveyed.name)
        style = plan.cp[f"{surveyed.name}.{MIXER}"]
        brings = isinstance(style, AttentionStyle) and style.op.strategy.takes_latents
        reads = _reads_projection(surveyed.name, mesh, plan.tp)
        if brings and reads and not surveyed.sink and hands_on_latents(attention):
            exchange_latents(attention)


def _reads_projection(name: str, mesh: ParallelMesh, tp: Mapping[str, ParallelStyle]) -> bool:
    """Whether a mixer finds in a module's projection the rows of the heads of its rank of tp.

    A style of tp would see no other projection than that of the latents' own style.
    """
    known = mesh.tp is None or isinstance(tp.get(name), LatentHeads)
    return known or isinstance(tp.get(f"{name}.{PROJECTION}"), LocalParams)


def _check_picked_latents(
    survey: Survey, mesh: ParallelMesh, tp: Mapping[str, ParallelStyle]
) -> None:
    """Refuse layers that read picked latents, and whose heads are split in a way not known."""
    for each in survey.attentions:
        if each.num_selected and not _reads_projection(each.name, mesh, tp):
            raise ValueError(
                f"Latents of picked tokens are read by the heads of each rank of tp, got "
                f"tp={mesh.size('tp')} and {each.name}, whose {PROJECTION} is placed by "
                f"{tp.get(f'{each.name}.{PROJECTION}')}: leave tp out, or what was added to it."
            )


def _without(
    experts: Mapping[str, ParallelStyle], plan: Mapping[str, ParallelStyle]
) -> dict[str, ParallelStyle]:
    """A plan of tp without what has a style on ep."""
    return {name: style for name, style in plan.items() if name not in experts}


def _check_whole_weights(model: nn.Module, mesh: ParallelMesh) -> None:
    """Refuse weights that are shards already, and a model that is on the meta device in part."""
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            raise ValueError(
                f"parallelize_hf shards whole weights, got {name} of a {type(model).__name__} "
                f"placed as {parameter.placements}: give it the model as it was built."
            )
    on_meta = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if on_meta and len(on_meta) < sum(1 for _ in model.parameters()):
        raise ValueError(
            f"A model is on a real device with its weights, or on the meta device, got a "
            f"{type(model).__name__} with {on_meta[0]} on the meta device and others not: load it "
            f"without device_map or offloading, or build all of it under torch.device('meta')."
        )
    _check_device_of_quantized(model, mesh)


def _check_device_of_quantized(model: nn.Module, mesh: ParallelMesh) -> None:
    """Refuse quantized weights that are elsewhere than their rank computes: nothing moves them."""
    layers = quantized_layers(model)
    if not layers:
        return
    own = torch.device(mesh.device_mesh.device_type)
    if own.type != "cpu":
        own = torch.device(own.type, torch.get_device_module(own).current_device())
    for name, layer in layers.items():
        for x in (*layer.parameters(recurse=False), *layer.buffers(recurse=False)):
            if x.device != own:
                raise ValueError(
                    f"Quantized weights stay where they were loaded, got {name} on {x.device} for "
                    f"a rank that computes on {own}: call from_pretrained on every rank, with "
                    f"device_map={{'': '{own}'}}."
                )


def _keep_quantized_whole(outer: Any, model: nn.Module) -> None:
    """Say once what each rank has whole; and leave it as it is.

    Args:
        outer: the PeftModel around the model, or itself.
    """
    words = whole_in_words(model)
    if not words:
        return
    log.warning("%s", words)
    keep_unpacked(model)
    if outer is not model:
        refuse_merging(outer)


def _check_same_weights(model: nn.Module, mesh: ParallelMesh) -> None:
    """Refuse a model whose weights differ between ranks: their shards would not fit together."""
    if mesh.degrees.world == 1:
        return
    on_meta = next(model.parameters()).is_meta
    if not _is_alike(torch.tensor([int(on_meta)], device=mesh.device_mesh.device_type), mesh):
        raise ValueError(
            f"A model is on the meta device on all ranks or on none, got a {type(model).__name__} "
            f"with on_meta={on_meta} here and others elsewhere: build all alike."
        )
    if on_meta:
        return
    quantized = quantized_layers(model)
    whole = weights_kept_whole(model)
    sums = [p.detach().sum(dtype=torch.float64) for p in model.parameters() if p not in whole]
    held = [x for layer in quantized.values() for x in tensors_held(layer) if x.numel()]
    sums += [x.contiguous().view(-1).view(torch.uint8).sum(dtype=torch.float64) for x in held]
    local = torch.stack([x.to(mesh.device_mesh.device_type) for x in sums])
    # How many first: a sum over ranks with other numbers of them ends in an error of gloo's.
    if not (_is_alike(local.new_tensor([len(sums)]), mesh) and _is_alike(local, mesh)):
        raise ValueError(
            f"Ranks hold the same weights before they are sharded, got a {type(model).__name__} "
            f"whose weights differ: seed all ranks alike, or load the same checkpoint."
        )


def _is_alike(local: Tensor, mesh: ParallelMesh) -> bool:
    """Whether all ranks have the same numbers; the same answer on each of them."""
    # The largest of x and of -x over all ranks: the same number where all have the same x.
    largest = torch.stack((local, -local)).nan_to_num()
    for group in mesh.device_mesh.get_all_groups():
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    return torch.equal(largest[0], -largest[1])


def _make_experts_compilable(model: Any, compile: Compile | None) -> None:
    """Replace transformers' loop over the chosen experts, which has no graph."""
    implementation = getattr(model.config, "_experts_implementation", None)
    if compile is not None and compute_without_loop(model):
        return
    if (
        compile is not None
        and implementation == "eager"
        and model._can_set_experts_implementation()
    ):
        log.warning(
            "Experts of %s are computed by grouped_mm, for a loop over the chosen ones has no "
            "graph: set experts_implementation to choose another.",
            type(model).__name__,
        )
        model.set_experts_implementation("grouped_mm")


def _block(name: str) -> str:
    """The repeated block that holds an attention module: up to the first number in its name."""
    prefix = re.match(r"(.*?)\.\d+(?=\.|$)", name)
    if prefix is None:
        raise ValueError(
            f"Blocks are the entries of a list of layers, got the attention module {name!r}, "
            f"which is in no list: pass a ParallelPlan to parallelize."
        )
    return f"{prefix.group(1)}.*"


def _keep_dtype(model: Any) -> tuple[str, ...]:
    """What transformers itself loads in fp32, whatever dtype it is asked for."""
    keys = model._keep_in_fp32_modules_strict or ()
    pattern = re.compile("|".join(key.replace("*", ".*") for key in sorted(keys)))
    return tuple(name for name, _ in model.named_parameters() if keys and pattern.search(name))


def _fsdp_units(model: Any) -> tuple[tuple[str, ...], ...]:
    """Embedding and head each gathered alone; a weight they share, with the rest of the model.

    A layer of peft's has what it stands for inside: one that was shared goes on being so.
    """
    names = {module: name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    units = [names[module] for module in (embedding, head) if module is not None]
    tied = find_tied_parameters(model)
    if head is None or any(_is_shared(tied, unit) for unit in units):
        return ()
    return (names[embedding],), (names[head],)


def _is_shared(tied: TiedParameters, module: str) -> bool:
    """Whether a parameter inside of a module is one outside of it, too."""
    return any(len({name.startswith(f"{module}.") for name in group}) > 1 for group in tied)
