"""A model to check: how it is built and called, on one device and on a mesh."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dtcp.distributed.mesh import ParallelMesh
from dtcp.huggingface.padding_ids import padding_token
from dtcp.parallelize import Compile
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import SequenceLayout
from dtcp.sharded_batch import ShardedBatch
from dtcp.softmax.style import AttentionStyle


@dataclass(frozen=True)
class Mixing:
    """Where tokens meet in a model, and which style carries it out.

    Args:
        claims: module name -> the style and the mixer that it claims.
        refused: what cannot be sharded, in sentences.
        tp_styles: module name (or pattern) -> its style under tensor parallelism.
        notes: what else the reader should know about the checked model.
    """

    claims: Mapping[str, str]
    refused: tuple[str, ...]
    tp_styles: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


class CheckedModel(Protocol):
    """A model that every rank can build alike."""

    def parameter_count(self) -> int:
        """How many numbers the model's parameters hold."""

    def build(self) -> Any:
        """The model, in fp64."""

    def mixing(self, model: Any, style: AttentionStyle, tp: int = 1) -> Mixing: ...

    def parallelize(
        self, model: Any, mesh: ParallelMesh, style: AttentionStyle, compile: Compile | None
    ) -> nn.Module: ...

    def logits_on_one_device(self, model: Any, input_ids: Tensor, documents: Documents) -> Tensor:
        """Logits of one row of packed documents, [1, S, C]."""

    def shard(
        self,
        model: Any,
        batch: Mapping[str, Tensor],
        documents: Documents,
        mesh: ParallelMesh,
        layout: type[SequenceLayout],
    ) -> tuple[dict[str, Tensor], ShardedBatch]:
        """This rank's part of whole rows; labels are shifted already."""

    def local_logits(
        self, model: Any, batch: Mapping[str, Tensor], sharded: ShardedBatch
    ) -> Tensor:
        """Logits of this rank's part, [1, L, C]."""


def vocabulary(model: Any) -> int:
    """Size of a model's vocabulary: the rows of its embedding, or of its first one.

    Raises:
        ValueError: it has none.
    """
    # A model of transformers says which; that of images may come first.
    of_tokens = getattr(model, "get_input_embeddings", lambda: None)()
    for module in (of_tokens, *model.modules()):
        if isinstance(module, nn.Embedding):
            return module.num_embeddings
    raise ValueError(
        f"A model is checked on random tokens, got {type(model).__name__} without an nn.Embedding: "
        f"give it one."
    )


def padding_id(model: Any) -> int | None:
    """The padding id of a model of transformers; some count positions without its tokens."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config"):
        return None
    return padding_token(model, decoder=True)


def check_logits(model: nn.Module, logits: Any, seq_len: int) -> Tensor:
    """The logits of a model on a row of seq_len tokens.

    Raises:
        ValueError: they are anything but a vector for each token.
    """
    if isinstance(logits, Tensor) and logits.shape[:-1] == (1, seq_len):
        return logits
    what = f"from {type(model).__name__} for [1, {seq_len}] tokens"
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"A checked model returns logits [B, S, C], got a {type(logits).__name__} {what}: "
            f"check a module around it that returns them alone, and leaves losses as attributes "
            f"(docs/check.md)."
        )
    raise ValueError(
        f"A checked model returns logits [B, S, C], one vector for each token, got a tensor of "
        f"shape {list(logits.shape)} {what}: check a model without what pools or gathers them "
        f"(docs/not_supported.md says how to pool)."
    )


def in_fp64(model: Any) -> Any:
    """The model in fp64 with noise on every weight: norms and gates start as ones or zeros."""
    model = model.double().train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model
