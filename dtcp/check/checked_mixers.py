"""A model that calls mixers, to check."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dtcp.batch import shard_batch
from dtcp.check.checked_model import Mixing, check_logits, in_fp64, vocabulary
from dtcp.distributed.mesh import ParallelMesh
from dtcp.huggingface.mixing_probe import calls, find_mixing, mixers_without_mixing, probe_length
from dtcp.huggingface.own_errors import ModelRefused, imported, model_of_function, own_errors
from dtcp.metadata import BatchMetadata
from dtcp.mixer import Mixer
from dtcp.mixer_metadata import batch_metadata
from dtcp.parallelize import Compile, ParallelPlan, parallelize
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import SequenceLayout
from dtcp.sharded_batch import ShardedBatch
from dtcp.softmax.mixer import CrossAttention
from dtcp.softmax.style import AttentionStyle


@dataclass(frozen=True)
class CheckedMixerModel:
    """A model that calls mixers, as model(input_ids, position_ids, attn_metadata).

    Args:
        model: module:function that returns it.
        plan: module:function of (model, mesh, style) that returns a ParallelPlan; empty for a plan
            that claims every mixer by the style and does nothing else.
        change: keyword arguments of the function that returns the model.
    """

    model: str
    plan: str = ""
    change: Mapping[str, Any] = field(default_factory=dict)

    def parameter_count(self) -> int:
        return sum(p.numel() for p in model_of_function(self.model, **self.change).parameters())

    def build(self) -> nn.Module:
        return in_fp64(model_of_function(self.model, **self.change))

    def mixing(self, model: nn.Module, style: AttentionStyle, tp: int = 1) -> Mixing:
        _check_one_sequence(model)
        seq_len = probe_length(model)
        documents = Documents.single(1, seq_len)
        input_ids = torch.arange(seq_len)[None] % vocabulary(model)
        self.logits_on_one_device(model, input_ids, documents)
        attn_metadata = _metadata(model, documents)
        run = partial(model, input_ids, documents.position_ids(), attn_metadata)
        with mixers_without_mixing(model) as names:
            mixing = find_mixing(model.eval(), run, seq_len)
        model.train()
        refused = tuple(
            f"{name or 'the model'} ({type(model.get_submodule(name)).__name__}): tokens meet in "
            f"it, and in no mixer: call one there (docs/add_a_model.md)."
            for name in mixing
        )
        # What a plan makes of them is known on the ranks.
        claimed = f"claimed by {self.plan}" if self.plan else f"{style}"
        mixers = {name: model.get_submodule(name) for name in names}
        return Mixing({name: f"{claimed}, {mixer}" for name, mixer in mixers.items()}, refused)

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
        position_ids = documents.position_ids()
        remedy = "correct the model; it is called as model(input_ids, position_ids, attn_metadata)"
        with own_errors(f"{type(model).__name__} runs on one device", remedy), _named(model):
            attn_metadata = _metadata(model, documents)
            logits = model(input_ids, position_ids, attn_metadata)
        return check_logits(model, logits, input_ids.shape[1])

    def shard(
        self,
        model: nn.Module,
        batch: Mapping[str, Tensor],
        documents: Documents,
        mesh: ParallelMesh,
        layout: type[SequenceLayout],
    ) -> tuple[dict[str, Tensor], ShardedBatch]:
        prefix, block = _prefixes_and_blocks(documents)
        batch = {**batch, "prefix": prefix, "block": block}
        return shard_batch(batch, mesh, layout, model=model, documents=documents)

    def local_logits(
        self, model: nn.Module, batch: Mapping[str, Tensor], sharded: ShardedBatch
    ) -> Tensor:
        return model(batch["input_ids"], batch["position_ids"], sharded.attn_metadata)


def _metadata(model: nn.Module, documents: Documents) -> BatchMetadata:
    prefix, block = _prefixes_and_blocks(documents)
    return batch_metadata(model, documents, prefix=prefix, block=block)


def _check_one_sequence(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, CrossAttention):
            raise ModelRefused(
                f"A check runs a model on one sequence, got {name} (CrossAttention), which attends "
                f"to another: compare it with one device in a script (docs/strategies.md, Keys of "
                f"another sequence), or check its encoder alone."
            )


def _prefixes_and_blocks(documents: Documents) -> tuple[Tensor, Tensor]:
    """For masks that ask: a third of a document as prefix, each second five tokens as a block."""
    by_token = [
        torch.tensor([length // 3 for length in row]).repeat_interleave(torch.tensor(row))
        for row in documents.lengths
    ]
    fives = documents.position_ids() // 5
    return torch.stack(by_token), torch.where(fives % 2 == 0, -1, fives)


@contextmanager
def _named(model: nn.Module) -> Iterator[None]:
    """Add the mixer's name to what it refuses: cross attention, heads that do not fit."""
    with calls(model, Mixer) as running:
        try:
            yield
        except (TypeError, ValueError) as error:
            if not running:
                raise
            kind = type(model.get_submodule(running[-1])).__name__
            raise ModelRefused(f"{running[-1]} ({kind}): {error}") from error
