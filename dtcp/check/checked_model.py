"""A model to check: how it is built and called, on one device and on a mesh."""

import importlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dtcp.batch import ShardedBatch
from dtcp.check.configs import SmallConfig, small_config
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
from dtcp.parallelize.plans.huggingface_tensor_plan import hf_tensor_plan
from dtcp.sequence.documents import Documents
from dtcp.softmax.style import AttentionStyle


@dataclass(frozen=True)
class Mixing:
    """Where tokens meet in a model, and which style carries it out.

    Args:
        claims: module name -> the style and the mixer that it claims.
        refused: what cannot be sharded, in sentences.
        tp_styles: module name (or pattern) -> its style under tensor parallelism.
        notes: what else a reader has to know of the model that is checked.
    """

    claims: Mapping[str, str]
    refused: tuple[str, ...]
    tp_styles: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


class CheckedModel(Protocol):
    """A model that every rank can build alike."""

    def build(self) -> Any:
        """The model, in fp64."""
        ...

    def mixing(self, model: Any, style: AttentionStyle, tp: int = 1) -> Mixing: ...

    def parallelize(
        self, model: Any, mesh: ParallelMesh, style: AttentionStyle, compile: Compile | None
    ) -> nn.Module: ...

    def logits_on_one_device(self, model: Any, input_ids: Tensor, documents: Documents) -> Tensor:
        """Logits of one row of packed documents, [1, S, V]."""
        ...

    def local_logits(
        self, model: Any, batch: Mapping[str, Tensor], sharded: ShardedBatch
    ) -> Tensor:
        """Logits of this rank's part, [1, L, V]."""
        ...


@dataclass(frozen=True)
class CheckedHuggingFaceModel:
    """A causal language model of transformers.

    Args:
        config: a model type, the path of a config.json, or module:function that returns a model.
        change: fields of the config, with other values.
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
            # torch 2.13 has no grouped matmul in fp64; the batched one computes the same.
            model.set_experts_implementation("batched_mm")
        return _in_fp64(model)

    def mixing(self, model: Any, style: AttentionStyle, tp: int = 1) -> Mixing:
        surveyed = survey(model)
        claims = {f"{a.name}.{MIXER}": f"{style}, {a.mixer()}" for a in surveyed.attentions}
        notes = () if ":" in self.config else self._small().notes
        if surveyed.refused or tp == 1:
            return Mixing(claims, surveyed.refused, notes=notes)
        try:
            plan = hf_tensor_plan(model, tp)
        except ValueError as error:
            return Mixing(claims, (str(error),), notes=notes)
        # Layers are alike: one line for the modules that differ by their layer's number alone.
        styles = {re.sub(r"\.\d+(?=\.|$)", ".*", name): f"{each}" for name, each in plan.items()}
        return Mixing(claims, (), styles, notes)

    def _small(self) -> SmallConfig:
        return small_config(self.config, self.change)

    def parallelize(
        self, model: Any, mesh: ParallelMesh, style: AttentionStyle, compile: Compile | None
    ) -> nn.Module:
        return parallelize_hf(model, mesh, style, compile=compile)

    def logits_on_one_device(self, model: Any, input_ids: Tensor, documents: Documents) -> Tensor:
        """Each document by itself: not every model of transformers keeps packed ones apart."""
        parts = input_ids[0].split(documents.lengths[0])
        return torch.cat([model(input_ids=x[None], use_cache=False).logits for x in parts], dim=1)

    def local_logits(
        self, model: Any, batch: Mapping[str, Tensor], sharded: ShardedBatch
    ) -> Tensor:
        inputs = {key: batch[key] for key in ("input_ids", "position_ids")}
        return model(**inputs, attn_metadata=sharded.attn_metadata).logits


@dataclass(frozen=True)
class CheckedMixerModel:
    """A model that calls mixers, as model(input_ids, position_ids, attn_metadata).

    Args:
        model: module:function that returns it.
        plan: module:function of (model, mesh, style) that returns a ParallelPlan; empty for a plan
            that claims every mixer by the style and does nothing else.
    """

    model: str
    plan: str = ""

    def build(self) -> nn.Module:
        return _in_fp64(imported(self.model)())

    def mixing(self, model: nn.Module, style: AttentionStyle, tp: int = 1) -> Mixing:
        seq_len = probe_length(model)
        documents = Documents.single(1, seq_len)
        input_ids = torch.arange(seq_len)[None] % vocabulary(model)
        attn_metadata = batch_metadata(model, documents)
        run = partial(model, input_ids, documents.position_ids(), attn_metadata)
        with mixers_without_mixing(model) as names:
            mixing = find_mixing(model.eval(), run, seq_len)
        model.train()
        mixers = {name: model.get_submodule(name) for name in names}
        refused = tuple(
            f"{name or 'the model'} ({type(model.get_submodule(name)).__name__}): tokens meet in "
            f"it, and in no mixer: call one there (docs/add_a_model.md)."
            for name in mixing
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

    def logits_on_one_device(
        self, model: nn.Module, input_ids: Tensor, documents: Documents
    ) -> Tensor:
        attn_metadata = batch_metadata(model, documents)
        return model(input_ids, documents.position_ids(), attn_metadata)

    def local_logits(
        self, model: nn.Module, batch: Mapping[str, Tensor], sharded: ShardedBatch
    ) -> Tensor:
        return model(batch["input_ids"], batch["position_ids"], sharded.attn_metadata)


def imported(path: str) -> Callable[..., Any]:
    """Import the function that a path module:function names.

    Raises:
        ValueError: a path without a function, or a module without that function.
    """
    module, _, name = path.partition(":")
    if not name:
        raise ValueError(f"A function is named module:function, got {path!r}: add its name.")
    function: Callable[..., Any] | None = getattr(importlib.import_module(module), name, None)
    if function is None:
        raise ValueError(
            f"A function is named module:function, got {path!r}: {module} has no {name}."
        )
    return function


def vocabulary(model: nn.Module) -> int:
    """Size of a model's vocabulary: the rows of its first embedding.

    Raises:
        ValueError: it has none.
    """
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            return module.num_embeddings
    raise ValueError(
        f"A model is checked on random tokens, got {type(model).__name__} without an nn.Embedding: "
        f"give it one."
    )


def _in_fp64(model: Any) -> Any:
    """In fp64, every weight with noise: fresh norms and gates are ones or zeros and hide errors."""
    model = model.double().train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model
