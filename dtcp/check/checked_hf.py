"""A language model of transformers, to check."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dtcp.batch import shard_batch
from dtcp.check.checked_model import Mixing, check_logits, in_fp64
from dtcp.check.true_fp64 import kernels_in_fp64
from dtcp.distributed.mesh import ParallelMesh
from dtcp.huggingface import shard_hf_batch, survey
from dtcp.huggingface.encoder_decoder import encoder_name
from dtcp.huggingface.language_model import model_of, parameter_count
from dtcp.huggingface.own_errors import model_of_function, own_errors
from dtcp.huggingface.registry import MIXER
from dtcp.huggingface.rotary_lengths import at_last_position
from dtcp.huggingface.small_config import SmallConfig, small_config
from dtcp.huggingface.token_dropouts import drops
from dtcp.parallelize import Compile, parallelize_hf
from dtcp.parallelize.plans.huggingface import RECURRENT
from dtcp.parallelize.plans.huggingface_tensor_plan import hf_tensor_plan
from dtcp.parallelize.plans.mixer_styles import carried_out_by
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import SequenceLayout
from dtcp.sharded_batch import ShardedBatch
from dtcp.softmax.style import AttentionStyle

REMEDY = "correct the config, by --set or in its file, or pass --hf-model module:function"
"""What to do where transformers builds no model of a config."""

_PROBED = 12
"""Tokens of the row on which a model runs before anything in it is changed."""


@dataclass(frozen=True)
class CheckedHuggingFaceModel:
    """A causal or masked language model of transformers.

    Args:
        config: a model type, the path of a config.json, or module:function that returns a model.
        change: fields of the config, with other values; keyword arguments of the function.
    """

    config: str
    change: Mapping[str, Any] = field(default_factory=dict)

    def parameter_count(self) -> int:
        if ":" in self.config:
            model = model_of_function(self.config, **self.change)
            return sum(p.numel() for p in model.parameters())
        return parameter_count(self._small().config, REMEDY)

    def build(self) -> Any:
        if ":" in self.config:
            model: Any = model_of_function(self.config, **self.change)
        else:
            model = model_of(self._small().config, REMEDY)
        if not hasattr(model, "set_attn_implementation"):
            raise ValueError(
                f"--hf-model names a function that returns a model of transformers, got "
                f"{type(model).__name__} from {self.config}: check models of other kinds by "
                f"--model."
            )
        config = model.config.get_text_config(decoder=True)
        if getattr(config, "_experts_implementation", None) == "grouped_mm":
            # torch 2.13 has no grouped matmul in fp64; the batched one computes the same.
            model.set_experts_implementation("batched_mm")
        return _without_token_dropout(self._as_it_runs(in_fp64(model)))

    def mixing(self, model: Any, style: AttentionStyle, tp: int = 1) -> Mixing:
        notes = () if ":" in self.config else self._small().notes
        try:
            self._run_alone(model)
            surveyed = survey(model)
        except ValueError as error:
            return Mixing({}, (str(error),), notes=notes)
        if surveyed.dropouts:
            notes = (*notes, "dropout: by token, left out here")
        try:
            claims = {
                f"{a.name}.{MIXER}": f"{carried_out_by(a, style)}, {a.mixer()}"
                for a in surveyed.attentions
            }
        except ValueError as error:
            return Mixing({}, (*surveyed.refused, str(error)), notes=notes)
        claims |= {
            each.name: f"{RECURRENT[each.kind]}, {each.mixer()}" for each in surveyed.recurrent
        }
        if surveyed.refused or tp == 1:
            return Mixing(claims, surveyed.refused, notes=notes)
        try:
            plan = hf_tensor_plan(model, tp)
        except ValueError as error:
            return Mixing(claims, (str(error),), notes=notes)
        # Layers are alike: one line for the modules that differ by their layer's number alone.
        styles = {re.sub(r"\.\d+(?=\.|$)", ".*", name): f"{each}" for name, each in plan.items()}
        return Mixing(claims, (), styles, notes)

    def parallelize(
        self, model: Any, mesh: ParallelMesh, style: AttentionStyle, compile: Compile | None
    ) -> nn.Module:
        return parallelize_hf(model, mesh, style, compile=compile)

    def logits_on_one_device(self, model: Any, input_ids: Tensor, documents: Documents) -> Tensor:
        """Each document by itself: not every model of transformers keeps packed ones apart."""
        parts = input_ids[0].split(documents.lengths[0])
        last = max(documents.lengths[0]) - 1
        with kernels_in_fp64(model), at_last_position(model, last):
            logits = [model(**_tokens(model, x[None]), use_cache=False).logits for x in parts]
        for part, each in zip(parts, logits, strict=True):
            check_logits(model, each, len(part))
        return torch.cat(logits, dim=1)

    def shard(
        self,
        model: Any,
        batch: Mapping[str, Tensor],
        documents: Documents,
        mesh: ParallelMesh,
        layout: type[SequenceLayout],
    ) -> tuple[dict[str, Tensor], ShardedBatch]:
        if not encoder_name(model):
            return shard_batch(batch, mesh, layout, model=model, documents=documents)
        parts = [_tokens(model, x) for x in batch["input_ids"].split(documents.lengths[0], dim=1)]
        whole = {key: torch.cat([part[key] for part in parts], dim=1) for key in parts[0]}
        memory = [part["input_ids"].shape[1] for part in parts]
        whole |= {"attention_mask": _numbers(memory), "labels": batch["labels"]}
        whole["decoder_attention_mask"] = _numbers(documents.lengths[0])
        return shard_hf_batch(whole, mesh, layout, model=model)

    def local_logits(
        self, model: Any, batch: Mapping[str, Tensor], sharded: ShardedBatch
    ) -> Tensor:
        inputs = {key: x for key, x in batch.items() if key.endswith(("input_ids", "position_ids"))}
        return model(**inputs, attn_metadata=sharded.attn_metadata).logits

    def _small(self) -> SmallConfig:
        return small_config(self.config, self.change, REMEDY)

    def _as_it_runs(self, model: Any) -> Any:
        """A model in fp64; if it does not run that way, the parts it keeps in fp32 stay so."""
        kept = getattr(model, "_keep_in_fp32_modules_strict", None)
        if not kept:
            return model
        try:
            self._run_alone(model)
        except ValueError:
            inside = re.compile("|".join(rf"(^|\.){re.escape(name)}($|\.)" for name in kept))
            for name, x in (*model.named_parameters(), *model.named_buffers()):
                if inside.search(name) and x.is_floating_point():
                    x.data = x.data.float()
        return model

    def _run_alone(self, model: Any) -> None:
        """Run the unmodified model on a few tokens: what fails here is not the mesh's doing."""
        name, input_ids = type(model).__name__, torch.arange(1, 1 + _PROBED)[None]
        remedy = "check it by hand, in a dtype and with inputs that it takes"
        run = partial(model, **_tokens(model, input_ids), use_cache=False)
        with torch.no_grad(), own_errors(f"{name} runs by itself, in fp64 on a CPU", remedy):
            out = run()
            check_logits(model, getattr(out, "logits", out), _PROBED)


def _without_token_dropout(model: Any) -> Any:
    """Switch off the dropouts that a mesh applies by token.

    One device runs each document as a row of its own here, where tokens have other indices.
    """
    for module in model.modules():
        if drops(module):
            module.eval()
    return model


def _tokens(model: Any, input_ids: Tensor) -> dict[str, Tensor]:
    """What a model reads of a document: its tokens; an encoder, others and one fewer."""
    if not encoder_name(model):
        return {"input_ids": input_ids}
    return {"input_ids": input_ids.flip(1)[:, 1:], "decoder_input_ids": input_ids}


def _numbers(lengths: Sequence[int]) -> Tensor:
    """The number of each token's document, from 1 on: [1, S]."""
    return torch.arange(1, 1 + len(lengths)).repeat_interleave(torch.tensor(lengths))[None]
