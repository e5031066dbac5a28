"""What a forecast is of: a model, its plan on a mesh, its batch and its logits."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dtcp.batch import shard_batch
from dtcp.distributed.mesh import ParallelMesh
from dtcp.huggingface.config_fields import config_of
from dtcp.huggingface.own_errors import model_of_function
from dtcp.labels import IGNORED, look_ahead
from dtcp.parallelize import ParallelPlan
from dtcp.parallelize.plans.families import FAMILIES, MODEL_TYPES
from dtcp.planner.hf_config import REMEDY, read_hf_config, text_model_of, without_dtype
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import SequenceLayout
from dtcp.sharded_batch import ShardedBatch
from dtcp.softmax.style import AttentionStyle

Batch = tuple[dict[str, Tensor], ShardedBatch]


class Subject(Protocol):
    """A model that can be forecast."""

    @property
    def name(self) -> str: ...

    def build(self) -> nn.Module:
        """The model, on the device and in the dtype that are the default."""

    def plan(
        self, model: nn.Module, mesh: ParallelMesh, attention: AttentionStyle, layout: Any
    ) -> ParallelPlan:
        """What its modules become; ValueError: this mesh or strategy does not suit it."""

    def batch(
        self,
        model: nn.Module,
        mesh: ParallelMesh,
        layout: type[SequenceLayout],
        documents: Documents,
    ) -> Batch:
        """A rank's part of a batch of these documents."""

    def logits(
        self, model: nn.Module, local: Mapping[str, Tensor], sharded: ShardedBatch
    ) -> tuple[Tensor, ...]:
        """Of the next token, and of those further ahead that it predicts."""


class _CalledWithMixers:
    """A model that is called as ours are."""

    def batch(
        self,
        model: nn.Module,
        mesh: ParallelMesh,
        layout: type[SequenceLayout],
        documents: Documents,
    ) -> Batch:
        rows = self.rows(documents)
        return shard_batch(
            rows, mesh, layout, model=model, documents=documents, compare_ranks=False
        )

    def rows(self, documents: Documents) -> dict[str, Tensor]:
        """A batch of these documents, whole."""
        return _rows_of(documents)

    def logits(
        self, model: nn.Module, local: Mapping[str, Tensor], sharded: ShardedBatch
    ) -> tuple[Tensor, ...]:
        more = [local[key] for key in ("mtp_input_ids",) if key in local]
        return _as_tuple(
            model(local["input_ids"], local["position_ids"], sharded.attn_metadata, *more)
        )


@dataclass(frozen=True)
class FamilyModel(_CalledWithMixers):
    """A model of one of dtcp's families, as train.py runs it.

    Args:
        family: a name of parallelize.plans.families.FAMILIES.
        config: of its folder in dtcp.models.
    """

    name: str
    family: str
    config: Any

    def build(self) -> nn.Module:
        return FAMILIES[self.family].model(self.config)

    def plan(
        self, model: nn.Module, mesh: ParallelMesh, attention: AttentionStyle, layout: Any
    ) -> ParallelPlan:
        return FAMILIES[self.family].plan(self.config, mesh, lambda: attention, layout)

    def rows(self, documents: Documents) -> dict[str, Tensor]:
        rows = _rows_of(documents)
        ids = rows["input_ids"]
        if getattr(self.config, "vision_blocks", False):
            rows["mm_token_type_ids"] = torch.zeros_like(ids)
        if depths := FAMILIES[self.family].mtp_depths(self.config):
            rows |= look_ahead(ids, rows["labels"], documents, depths=depths)
        return rows


@dataclass(frozen=True)
class HuggingFaceModel:
    """An unmodified model of transformers, as parallelize_hf runs it."""

    name: str
    config: Any = field(repr=False)

    def build(self) -> nn.Module:
        from dtcp.huggingface.language_model import model_of

        return model_of(without_dtype(self.config), REMEDY)

    @cached_property
    def survey(self) -> Any:
        """Of a model that it builds: all have one, and of a deep one it takes seconds."""
        from dtcp.huggingface.install import survey_of

        with torch.device("meta"):
            model = self.build()
        with torch.device("cpu"):
            return survey_of(model)

    def plan(
        self, model: nn.Module, mesh: ParallelMesh, attention: AttentionStyle, layout: Any
    ) -> ParallelPlan:
        from dtcp.huggingface import install_mixers
        from dtcp.parallelize.plans.huggingface import hf_plan, share_latents
        from dtcp.parallelize.tensor_parallel import separate_gate_and_up

        survey = install_mixers(model, surveyed=self.survey)
        separate_gate_and_up(model)
        plan = hf_plan(model, survey, mesh, attention)
        share_latents(model, survey, mesh, plan)
        return plan

    def batch(
        self,
        model: nn.Module,
        mesh: ParallelMesh,
        layout: type[SequenceLayout],
        documents: Documents,
    ) -> Batch:
        from dtcp.huggingface import shard_hf_batch
        from dtcp.huggingface.encoder_decoder import encoder_name

        rows = dict(_rows_of(documents))
        if encoder_name(model):
            # As many tokens for the decoder as for the encoder.
            own = {f"decoder_{key}": rows[key] for key in ("input_ids", "position_ids")}
            rows |= own
        return shard_hf_batch(rows, mesh, layout, model=model, compare_ranks=False)

    def logits(
        self, model: nn.Module, local: Mapping[str, Tensor], sharded: ShardedBatch
    ) -> tuple[Tensor, ...]:
        inputs = {key: x for key, x in local.items() if key not in ("labels", "padding_mask")}
        return _as_tuple(
            model(**inputs, attn_metadata=sharded.attn_metadata, use_cache=False).logits
        )


@dataclass(frozen=True)
class MadeHuggingFaceModel(HuggingFaceModel):
    """A model of transformers that a function returns, module:function as its name."""

    config: None = None

    def build(self) -> nn.Module:
        model = model_of_function(self.name)
        if not hasattr(model, "set_attn_implementation"):
            raise ValueError(
                f"A model that is not of transformers needs a plan, got {type(model).__name__} "
                f"from --model {self.name} without one: add --plan module:function."
            )
        return model


@dataclass(frozen=True)
class OwnModel(_CalledWithMixers):
    """A user's model with mixers, called as ours are, and its plan.

    Args:
        name: the function that returns it, module:function.
        make_plan: model, mesh and strategy to a ParallelPlan.
    """

    name: str
    make_plan: Callable[[nn.Module, ParallelMesh, AttentionStyle], ParallelPlan]

    def build(self) -> nn.Module:
        return model_of_function(self.name)

    def plan(
        self, model: nn.Module, mesh: ParallelMesh, attention: AttentionStyle, layout: Any
    ) -> ParallelPlan:
        return self.make_plan(model, mesh, attention)


def _rows_of(documents: Documents) -> dict[str, Tensor]:
    """A batch of these documents, with the same id for every token."""
    ids = torch.zeros(documents.batch, documents.seq_len, dtype=torch.int64)
    # Padding is not predicted.
    labels = ids.masked_fill(documents.document() < 0, IGNORED)
    return {"input_ids": ids, "labels": labels, "position_ids": documents.position_ids()}


def _as_tuple(logits: Any) -> tuple[Tensor, ...]:
    return logits if isinstance(logits, tuple) else (logits,)


def subject_of_hf(source: str) -> Subject:
    """The model of a config.json, of its folder, of a preset's name or of a model type.

    Of a model that takes images or sounds, that of its text: rows of tokens are what is planned.

    Raises:
        ValueError: no such file, preset or type, or a config that its family refuses.
    """
    name, fields = read_hf_config(source)
    text = fields.get("text_config") or {}
    family = MODEL_TYPES.get(fields["model_type"]) or MODEL_TYPES.get(str(text.get("model_type")))
    if family is None:
        return HuggingFaceModel(name, text_model_of(config_of(fields, REMEDY)))
    try:
        return FamilyModel(name, family.name, family.config_from_hf(fields))
    except KeyError as error:
        raise ValueError(
            f"A config has all sizes of its model, got {source!r} of a {fields['model_type']} "
            f"without {error.args[0]}: add it to the file."
        ) from None
    except (TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(
            f"A config has numbers where its model has sizes, got {source!r} of a "
            f"{fields['model_type']} ({error}): correct the file."
        ) from None
