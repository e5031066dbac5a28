"""What is checked: a model, how it is called, and what becomes of it on a mesh."""

import importlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dtcp.batch import ShardedBatch
from dtcp.check.configs import Small, small_config
from dtcp.distributed.mesh import ParallelMesh
from dtcp.huggingface import survey
from dtcp.huggingface.mixing_probe import find_mixing, mixers_without_mixing, probe_length
from dtcp.huggingface.registry import MIXER
from dtcp.mixer import Mixer, batch_metadata
from dtcp.parallelize import (
    Compile,
    ParallelPlan,
    parallelize,
    parallelize_hf,
)
from dtcp.parallelize.plans.huggingface import tensor_plan
from dtcp.sequence.documents import Documents
from dtcp.softmax.style import AttentionStyle


@dataclass(frozen=True)
class Mixing:
    """Where tokens meet, and what becomes of it.

    Args:
        claimed: module name -> what claims it.
        refused: what nobody can carry out, in sentences.
        split: module name (or pattern) -> its style under tensor parallelism.
        said: what else a reader has to know of the model that is checked.
    """

    claimed: Mapping[str, str]
    refused: tuple[str, ...]
    split: Mapping[str, str] = field(default_factory=dict)
    said: tuple[str, ...] = ()


class Subject(Protocol):
    """A model that can be made again, alike, on every rank."""

    def build(self) -> Any:
        """The model, in fp64."""
        ...

    def mixing(self, model: Any, style: AttentionStyle, tp: int = 1) -> Mixing: ...

    def parallelize(
        self, model: Any, mesh: ParallelMesh, style: AttentionStyle, compile: Compile | None
    ) -> nn.Module: ...

    def whole(self, model: Any, input_ids: Tensor, documents: Documents) -> Tensor:
        """Logits of one row of packed documents, on one device."""
        ...

    def local(self, model: Any, batch: Mapping[str, Tensor], plan: ShardedBatch) -> Tensor:
        """Logits of a rank's part."""
        ...


@dataclass(frozen=True)
class HuggingFaceSubject:
    """A causal language model of transformers.

    Args:
        config: a model type, the path of a config.json, or module:function that returns a model.
        change: fields of the config that are something else.
    """

    config: str
    change: Mapping[str, Any] = field(default_factory=dict)

    def build(self) -> Any:
        if ":" in self.config:
            model = imported(self.config)()
        else:
            from transformers import AutoModelForCausalLM

            model = AutoModelForCausalLM.from_config(self._small().config)
        if getattr(model.config, "_experts_implementation", None) == "grouped_mm":
            # torch has no grouped matmul in fp64 (2.13); what experts compute is the same.
            model.set_experts_implementation("batched_mm")
        return _counting(model)

    def mixing(self, model: Any, style: AttentionStyle, tp: int = 1) -> Mixing:
        found = survey(model)
        claimed = {f"{a.name}.{MIXER}": f"{style}, {a.mixer()}" for a in found.attentions}
        said = () if ":" in self.config else self._small().said
        if found.refused or tp == 1:
            return Mixing(claimed, found.refused, said=said)
        try:
            split = tensor_plan(model, tp)
        except ValueError as error:
            return Mixing(claimed, (str(error),), said=said)
        # Layers are alike, and their numbers say nothing.
        named = {re.sub(r"\.\d+(?=\.|$)", ".*", name): f"{each}" for name, each in split.items()}
        return Mixing(claimed, (), named, said)

    def _small(self) -> Small:
        return small_config(self.config, self.change)

    def parallelize(
        self, model: Any, mesh: ParallelMesh, style: AttentionStyle, compile: Compile | None
    ) -> nn.Module:
        return parallelize_hf(model, mesh, style, compile=compile)

    def whole(self, model: Any, input_ids: Tensor, documents: Documents) -> Tensor:
        """Each document alone: not every model of transformers keeps packed ones apart."""
        parts = input_ids[0].split(documents.lengths[0])
        return torch.cat([model(input_ids=x[None], use_cache=False).logits for x in parts], dim=1)

    def local(self, model: Any, batch: Mapping[str, Tensor], plan: ShardedBatch) -> Tensor:
        named = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
        return model(**named, attn_metadata=plan.attn_metadata).logits


@dataclass(frozen=True)
class MixerSubject:
    """A model that calls mixers, as model(input_ids, position, tables).

    Args:
        model: module:function that returns it.
        plan: module:function of (model, mesh, style) that returns a ParallelPlan; empty for one
            that claims every mixer by the style and leaves the rest.
    """

    model: str
    plan: str = ""

    def build(self) -> nn.Module:
        return _counting(imported(self.model)())

    def mixing(self, model: nn.Module, style: AttentionStyle, tp: int = 1) -> Mixing:
        seq_len = probe_length(model)
        documents = Documents.single(1, seq_len)
        input_ids = torch.arange(seq_len)[None] % vocabulary(model)
        attn_metadata = batch_metadata(model, documents)
        run = partial(model, input_ids, documents.position_ids(), attn_metadata)
        with mixers_without_mixing(model) as names:
            found = find_mixing(model.eval(), run, seq_len)
        model.train()
        mixers = {name: model.get_submodule(name) for name in names}
        refused = tuple(
            f"{name or 'the model'} ({type(model.get_submodule(name)).__name__}): tokens meet in "
            f"it, and in no mixer: call one there (docs/add_a_model.md)."
            for name in found
        )
        return Mixing({name: f"{style}, {mixer}" for name, mixer in mixers.items()}, refused)

    def parallelize(
        self, model: nn.Module, mesh: ParallelMesh, style: AttentionStyle, compile: Compile | None
    ) -> nn.Module:
        if self.plan:
            plan = imported(self.plan)(model, mesh, style)
        else:
            mixers = {n: style for n, m in model.named_modules() if isinstance(m, Mixer)}
            plan = ParallelPlan(tp={}, cp=mixers, blocks=())
        return parallelize(model, mesh, plan, compile=compile)

    def whole(self, model: nn.Module, input_ids: Tensor, documents: Documents) -> Tensor:
        attn_metadata = batch_metadata(model, documents)
        return model(input_ids, documents.position_ids(), attn_metadata)

    def local(self, model: nn.Module, batch: Mapping[str, Tensor], plan: ShardedBatch) -> Tensor:
        return model(batch["input_ids"], batch["position_ids"], plan.attn_metadata)


def imported(path: str) -> Callable[..., Any]:
    """The function that module:function names."""
    module, _, name = path.partition(":")
    if not name:
        raise ValueError(f"A function is named module:function, got {path!r}: add its name.")
    found: Callable[..., Any] | None = getattr(importlib.import_module(module), name, None)
    if found is None:
        raise ValueError(
            f"A function is named module:function, got {path!r}: {module} has no {name}."
        )
    return found


def vocabulary(model: nn.Module) -> int:
    """Tokens a model knows: rows of its first embedding."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            return module.num_embeddings
    raise ValueError(
        f"A model is checked on random tokens, got {type(model).__name__} without an nn.Embedding: "
        f"give it one."
    )


def _counting(model: Any) -> Any:
    """In fp64, with weights of which each counts: fresh norms and gates would hide errors."""
    model = model.double().train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model
