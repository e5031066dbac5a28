"""What is checked: a model, how it is called, and what becomes of it on a mesh."""

import importlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dtcp.batch import BatchPlan
from dtcp.documents import Documents
from dtcp.huggingface import survey
from dtcp.huggingface.registry import MIXER
from dtcp.mesh import ParallelMesh
from dtcp.mixers import Mixer, batch_tables
from dtcp.mixing import find_mixing, mixers_apart, probe_length
from dtcp.style import AttentionStyle
from parallelize import Compile, ParallelPlan, parallelize, parallelize_hf

TINY: Mapping[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "experts_implementation": "batched_mm",
    "sliding_window": 7,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
"""A model of transformers asked for by its type alone."""


@dataclass(frozen=True)
class Mixing:
    """Where tokens meet: module name -> what claims it; and what is refused, in sentences."""

    claimed: Mapping[str, str]
    refused: tuple[str, ...]


class Subject(Protocol):
    """A model that can be made again, alike, on every rank."""

    def build(self) -> Any:
        """The model, in fp64."""
        ...

    def mixing(self, model: Any, style: AttentionStyle) -> Mixing: ...

    def parallelize(
        self, model: Any, mesh: ParallelMesh, style: AttentionStyle, compile: Compile | None
    ) -> nn.Module: ...

    def whole(self, model: Any, input_ids: Tensor, documents: Documents) -> Tensor:
        """Logits of one row of packed documents, on one device."""
        ...

    def local(self, model: Any, batch: Mapping[str, Tensor], plan: BatchPlan) -> Tensor:
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
        from transformers import AutoConfig, AutoModelForCausalLM

        if ":" in self.config:
            return _counting(imported(self.config)())
        if self.config.endswith(".json"):
            given = json.loads(Path(self.config).read_text())
            config = AutoConfig.for_model(given.pop("model_type"), **{**given, **self.change})
        else:
            tiny = {**TINY, **_layer_kinds(AutoConfig.for_model(self.config)), **self.change}
            config = AutoConfig.for_model(self.config, **tiny)
        return _counting(AutoModelForCausalLM.from_config(config))

    def mixing(self, model: Any, style: AttentionStyle) -> Mixing:
        found = survey(model)
        claimed = {f"{a.name}.{MIXER}": f"{style}, {a.mixer()}" for a in found.attentions}
        return Mixing(claimed, found.refused)

    def parallelize(
        self, model: Any, mesh: ParallelMesh, style: AttentionStyle, compile: Compile | None
    ) -> nn.Module:
        return parallelize_hf(model, mesh, style, compile=compile)

    def whole(self, model: Any, input_ids: Tensor, documents: Documents) -> Tensor:
        """Each document alone: not every model of transformers keeps packed ones apart."""
        parts = input_ids[0].split(documents.lengths[0])
        return torch.cat([model(input_ids=x[None], use_cache=False).logits for x in parts], dim=1)

    def local(self, model: Any, batch: Mapping[str, Tensor], plan: BatchPlan) -> Tensor:
        named = {"input_ids": batch["input_ids"], "position_ids": batch["position"]}
        return model(**named, tables=plan.tables).logits


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

    def mixing(self, model: nn.Module, style: AttentionStyle) -> Mixing:
        seq_len = probe_length(model)
        documents = Documents.single(1, seq_len)
        input_ids = torch.arange(seq_len)[None] % vocabulary(model)
        tables = batch_tables(model, documents)
        run = partial(model, input_ids, documents.position_in_document(), tables)
        with mixers_apart(model) as names:
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
        tables = batch_tables(model, documents)
        return model(input_ids, documents.position_in_document(), tables)

    def local(self, model: nn.Module, batch: Mapping[str, Tensor], plan: BatchPlan) -> Tensor:
        return model(batch["input_ids"], batch["position"], plan.tables)


def imported(path: str) -> Callable[..., Any]:
    """The function that module:function names."""
    module, _, name = path.partition(":")
    if not name:
        raise ValueError(f"A function is named module:function, got {path!r}: add its name.")
    found: Callable[..., Any] = getattr(importlib.import_module(module), name)
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


def _layer_kinds(config: Any) -> dict[str, Any]:
    """One layer of each kind that a family has, two at least."""
    kinds = list(dict.fromkeys(getattr(config, "layer_types", None) or ()))
    if not kinds:
        return {}
    layers = kinds if len(kinds) > 1 else kinds * 2
    return {"layer_types": layers, "num_hidden_layers": len(layers)}


def _counting(model: Any) -> Any:
    """In fp64, with weights of which each counts: fresh norms and gates would hide errors."""
    model = model.double().train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model
