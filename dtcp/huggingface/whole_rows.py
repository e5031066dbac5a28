"""A model of parallelize_hf as transformers' loops call it: whole rows in, whole rows out.

To such a loop the ranks of a cp and tp group are one process. They get the same rows; what they
return, the loss or numbers per token, is the same on all of them; and each has the gradient of its
own tokens, to be summed over cp as FSDP does.
"""

from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from dtcp.batch import PreparedBatch
from dtcp.distributed.gathered import free_gathered
from dtcp.distributed.gradient_sums import check_gradients_summed
from dtcp.distributed.mesh import ParallelMesh, check_parallel_mesh
from dtcp.distributed.replicated_loss import sum_for_replicated_loss
from dtcp.huggingface.attend_by_name import CACHES
from dtcp.huggingface.batch import LABELED_IN_PLACE, prepare_hf_batch, shard_hf_batch
from dtcp.huggingface.documents import documents_of_hf_batch
from dtcp.huggingface.encoder_decoder import encoder_name
from dtcp.huggingface.grouped_rows import GroupedRows, grouped_rows
from dtcp.huggingface.images import IMAGES
from dtcp.huggingface.install import model_with_mixers
from dtcp.huggingface.left_padding import left_padding, moved_back, moved_to_right
from dtcp.huggingface.linear_head import LinearHead
from dtcp.huggingface.prefetched_rows import PrefetchedRows
from dtcp.huggingface.rotary_lengths import goes_by_length
from dtcp.huggingface.router_logits import balance_loss_of_batch, balance_weight, is_balanced
from dtcp.huggingface.row_heads import gives_rows
from dtcp.huggingface.shared_prompts import check_counted_once, shares_prompts
from dtcp.inference_mode import no_inference_tensors
from dtcp.labels import IGNORED, shift_labels
from dtcp.linear_logits import LinearLogits
from dtcp.loss import divided_loss, global_token_count, token_log_probs
from dtcp.sequence.arguments import check_kind
from dtcp.sequence.buckets import Buckets
from dtcp.sequence.host import on_device
from dtcp.sequence.layout import HeadTail, SequenceLayout
from dtcp.sharded_batch import ShardedBatch
from dtcp.token_entropy import token_entropy
from dtcp.token_statistics import token_statistics


class RowOutputs(dict[str, Any]):
    """Outputs by name, also as attributes, as those of transformers are."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class WholeRows(nn.Module):
    """Calls a model of parallelize_hf with whole rows; one more module around it, as DDP is.

    Args:
        module: of parallelize_hf; with shared_prompts=True, rows that begin alike are put together.
        device: where the shards go; None leaves them where the rows are.
        buckets: sizes that rows are padded to.
        label_smoothing, z_loss: parts of the loss, as for token_mean_loss.
        linear_head: compute logits a part at a time, in the loss, and never hold them all. A call
            that asks for logits or for numbers of each token holds them.
        autocast: the dtype that torch.autocast lets the model compute in; None to leave it.
        temperature: what logits are divided by before numbers of each token are made of them.
        entropy_gradient: let the entropies among them have a gradient, as log_probs have one.
    """

    def __init__(
        self,
        module: nn.Module,
        mesh: ParallelMesh,
        layout: type[SequenceLayout] = HeadTail,
        *,
        device: torch.device | str | None = None,
        buckets: Buckets | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        linear_head: bool = False,
        autocast: torch.dtype | None = None,
        temperature: float = 1.0,
        entropy_gradient: bool = False,
    ) -> None:
        super().__init__()
        check_kind("WholeRows", nn.Module, module=module)
        check_parallel_mesh("WholeRows", mesh)
        self.module, self.mesh, self.layout = module, mesh, layout
        self.device, self.buckets = device, buckets
        self.label_smoothing, self.z_loss, self.autocast = label_smoothing, z_loss, autocast
        self.temperature, self.entropy_gradient = temperature, entropy_gradient
        self.linear_head = LinearHead(module) if linear_head else None
        self.shares_prompts = shares_prompts(model_with_mixers(module))
        """Whether what rows begin with is computed once, as parallelize_hf was asked to."""
        self.gathers_logits = False
        """Whether a call with labels gives logits, too: [B, S, V] on every rank."""
        self.gave_share = False
        """Whether the last loss, or that of the last logits, is a part of all batch ranks'."""
        self._prefetched = PrefetchedRows(self._prepared)

    def prepare_ahead(self, rows: Mapping[str, Any]) -> None:
        """Shard rows in a thread, before the model is called with them; on the host.

        A call with these very tensors then finds them ready. Rows of two sequences are left to it,
        and so are rows that may share prompts.
        """
        if not self.shares_prompts and not encoder_name(model_with_mixers(self.module)):
            self._prefetched.start(_read(rows))

    def forward(
        self,
        *,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        fused_lm_head: bool = False,
        output_router_logits: bool | None = None,
        **rows: Any,
    ) -> RowOutputs:
        """Run the model on whole rows, alike on all ranks of a cp and tp group.

        Rows are read on the host; where they come on a device, the host waits for them.

        Args:
            labels: [B, S], not shifted, as transformers has them; [B] for a model of rows.
            num_items_in_batch: tokens that the sum of losses is divided by, of all micro-batches of
                all batch ranks; None for the mean over these rows.
            fused_lm_head: give numbers of each token instead of a loss, as TRL's trainers ask for:
                log_probs, entropy, mean_logits, is_top1, log_sum_sq_probs and label_mask,
                [B, S - 1], of the next token of each. Rows may then be padded on the left, too.
            output_router_logits: add the balance loss of a mixture of experts; None for what the
                config says.
            rows: what shard_hf_batch takes.
        Returns:
            loss, the same on all ranks of a cp and tp group, each with the gradient of its own
            tokens; or the numbers of each token; and logits [B, S, V] where there are no labels.

        Without gradients nothing stays gathered for a backward pass: weights that a loop averages
        or steps after an evaluation are shards, and no copies.
        """
        with no_inference_tensors():
            try:
                return self._outputs(
                    rows, labels, num_items_in_batch, output_router_logits, numbers=fused_lm_head
                )
            finally:
                if not torch.is_grad_enabled():
                    free_gathered(self.module)

    def _outputs(
        self,
        rows: dict[str, Any],
        labels: Tensor | None,
        items: Tensor | int | None,
        output_router_logits: bool | None,
        *,
        numbers: bool,
    ) -> RowOutputs:
        _check_rows(rows)
        if self.mesh.cp is not None:
            check_gradients_summed(self.module, self.mesh)
        if numbers:
            self._check_token_numbers(labels)
        batch = _read({**rows, "labels": labels})
        padding = left_padding(batch) if numbers else None
        if padding is not None:
            as_long = goes_by_length(self.module)
            given = batch["labels"].shape[1]
            batch = moved_to_right(batch, padding, as_long=as_long)
        said = is_balanced(self.module) if output_router_logits is None else output_router_logits
        local, sharded, grouped = self._shards(batch, balanced=said)
        targets = local.pop("labels", None)
        local.pop("padding_mask", None)
        asked = {"output_router_logits": True} if said and targets is not None else {}
        head = None if numbers or targets is None else self._head()
        with self._autocast(), nullcontext() if head is None else head.hold():
            out = self.module(**local, attn_metadata=sharded.attn_metadata, **asked)
        if gives_rows(self.module):
            return self._outputs_of_rows(self._given(out.logits)[: sharded.unpadded_rows], targets)
        self.gave_share = items is not None and not numbers
        if targets is None:
            return RowOutputs(logits=self._whole_logits(out.logits, sharded, grouped))
        aux = self._balance(out.router_logits, sharded) if asked else None
        if numbers:
            outputs = RowOutputs(self._numbers(out.logits, targets, sharded))
            if grouped is not None:
                outputs = RowOutputs({k: grouped.restored(x)[:, :-1] for k, x in outputs.items()})
            mask = _has_next_token(batch.pop("labels"), batch)
            outputs["label_mask"] = on_device(mask, out.logits.device)
            if padding is not None:
                outputs = RowOutputs(moved_back(outputs, padding, given - 1))
        else:
            logits = out.logits if head is None else head.logits(out.logits)
            outputs = RowOutputs(loss=self._loss(logits, targets, items, aux))
            if self.gathers_logits:
                outputs["logits"] = self._whole_logits(out.logits, sharded, grouped)
        if aux is not None:
            outputs["aux_loss"] = aux
        return outputs

    def _shards(
        self, rows: Mapping[str, Any], *, balanced: bool
    ) -> tuple[dict[str, Tensor], ShardedBatch, GroupedRows | None]:
        options: dict[str, Any] = {"device": self.device, "buckets": self.buckets}
        grouped = cache(lambda: grouped_rows(rows) if self.shares_prompts else None)

        def put_together() -> PreparedBatch:
            check_counted_once(self.module, balanced=balanced)
            found = grouped()
            return self._prepared(rows if found is None else found.rows)

        taken = self._prefetched.take(rows)
        # Not before: what one rank refuses in it, the others hear of.
        options["prepared"] = put_together if self.shares_prompts else taken
        batch = shard_hf_batch(rows, self.mesh, self.layout, model=self.module, **options)
        return *batch, grouped()

    def _prepared(self, rows: Mapping[str, Any]) -> PreparedBatch:
        arguments = (rows, self.mesh, self.layout)
        return prepare_hf_batch(*arguments, model=self.module, buckets=self.buckets)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.autocast is None:
            return nullcontext()
        # Weights that were cast are not kept: FSDP frees those that they were made of.
        kind = next(self.module.parameters()).device.type
        return torch.autocast(kind, self.autocast, cache_enabled=False)

    def _given(self, logits: Tensor) -> Tensor:
        """Logits as a loop gets them: in fp32 where autocast has narrowed them."""
        return logits if self.autocast is None else logits.float()

    def _whole_logits(
        self, logits: Tensor, sharded: ShardedBatch, grouped: GroupedRows | None
    ) -> Tensor:
        whole = _gathered_logits(logits, sharded)
        return self._given(whole if grouped is None else grouped.restored(whole))

    def _head(self) -> LinearHead | None:
        return None if self.gathers_logits else self.linear_head

    def _loss(
        self,
        logits: Tensor | LinearLogits,
        targets: Tensor,
        items: Tensor | int | None,
        aux: Tensor | None,
    ) -> Tensor:
        tokens = global_token_count(targets, self.mesh.cp) if items is None else items
        # Over one rank of cp a loop may average gradients, as it averages losses.
        loss = divided_loss(
            logits, targets, tokens, label_smoothing=self.label_smoothing, z_loss=self.z_loss
        )
        if self.mesh.cp is not None:
            loss = sum_for_replicated_loss(loss, self.mesh.cp)
        if aux is None:
            return loss
        # A loss divided by the tokens of all ranks is multiplied by the number of ranks later on.
        share = 1 if items is None else self.mesh.size("batch")
        return loss + balance_weight(self.module) / share * aux

    def _numbers(self, logits: Tensor, targets: Tensor, sharded: ShardedBatch) -> dict[str, Tensor]:
        if self.temperature != 1:  # in fp32 at least, for it would be rounded once more
            dtype = torch.promote_types(logits.dtype, torch.float32)
            logits = logits.to(dtype) / self.temperature
        with_gradient = ("log_probs", "entropy") if self.entropy_gradient else ("log_probs",)
        return _numbers_of_tokens(logits, targets, sharded, with_gradient)

    def _balance(self, router_logits: Any, sharded: ShardedBatch) -> Tensor:
        """The balance loss over all tokens; its gradient is that for a mean over batch ranks."""
        aux = balance_loss_of_batch(self.module, router_logits, sharded)
        # Gradients of a loop are averaged over batch ranks, and each has those of its own tokens.
        return aux + (self.mesh.size("batch") - 1) * (aux - aux.detach())

    def _outputs_of_rows(self, logits: Tensor, labels: Tensor | None) -> RowOutputs:
        if labels is None:
            return RowOutputs(logits=logits)
        if self.label_smoothing or self.z_loss:
            raise ValueError(
                f"Labels are smoothed, and a z-loss is added, in a loss of tokens, got "
                f"label_smoothing={self.label_smoothing}, z_loss={self.z_loss} with labels of "
                f"rows: set them to 0, or leave labels out and make a loss of the logits."
            )
        module: Any = self.module
        loss = module.loss_function(
            logits=logits, labels=labels, pooled_logits=logits, config=module.config
        )
        return RowOutputs(loss=loss, logits=logits)

    def _check_token_numbers(self, labels: Tensor | None) -> None:
        module = self.module
        in_place = getattr(module, "loss_type", None) in LABELED_IN_PLACE
        if (
            labels is None
            or in_place
            or encoder_name(model_with_mixers(module))
            or gives_rows(module)
        ):
            raise ValueError(
                f"Log-probabilities of next tokens are a language model's, of its labels, got "
                f"fused_lm_head=True with {type(module).__name__}, labels of type "
                f"{type(labels).__name__}: call it with labels for its own loss."
            )
        if self.label_smoothing or self.z_loss:
            raise ValueError(
                f"A loss of log-probabilities is made by its trainer, got label_smoothing="
                f"{self.label_smoothing}, z_loss={self.z_loss}, which only the loss of a language "
                f"model has: set them to 0."
            )


CALL_KEYS = ("use_cache", "return_dict", "logits_to_keep", "output_attentions", "margin")
"""What loops pass besides rows: to leave something out, or for their own loss."""


def _check_rows(rows: dict[str, Any]) -> None:
    """Refuse arguments that whole rows are not computed with."""
    if rows.get("use_cache") or any(rows.get(name) is not None for name in CACHES):
        raise ValueError(
            f"A model on a mesh computes whole rows, got a call with a cache (use_cache, "
            f"{', '.join(CACHES)}), as generate makes them: save the model and generate with a "
            f"plain one."
        )
    for key in ("logits_to_keep", "output_attentions"):
        if isinstance(rows.get(key), Tensor) or rows.get(key):
            raise ValueError(
                f"A model on a mesh gives logits of all tokens and no attention weights, got {key}="
                f"{rows[key]!r}: leave it out."
            )
    if "shift_labels" in rows:
        raise ValueError(
            "Labels of whole rows are not shifted yet, got shift_labels, as collators give them "
            "that cut rows for ranks: give labels, and the same rows to all ranks of a cp group."
        )


def _read(rows: Mapping[str, Any]) -> dict[str, Any]:
    """The rows that are read, on the host."""
    kept = {key: x for key, x in rows.items() if key not in CALL_KEYS and x is not None}
    return {key: _on_host(key, x) for key, x in kept.items()}


def _on_host(key: str, x: Any) -> Any:
    """Rows move to the host, where they are sharded; images stay."""
    return x.cpu() if isinstance(x, Tensor) and key not in IMAGES else x


def _has_next_token(labels: Any, rows: dict[str, Any]) -> Tensor:
    """Which tokens have a loss, but for the last one of each row: [B, S - 1]."""
    return shift_labels(labels, documents_of_hf_batch(rows))[:, :-1] != IGNORED


def _gathered_logits(logits: Tensor, sharded: ShardedBatch) -> Tensor:
    """Logits [B, S, V] of local ones, for a loss that all ranks of the group compute alike."""
    if isinstance(logits, DTensor):
        whole = logits.redistribute(placements=[Replicate()] * logits.device_mesh.ndim)
        logits = whole.to_local(grad_placements=whole.placements)
    return sharded.gather(logits, replicated_loss=True)


def _numbers_of_tokens(
    logits: Tensor, targets: Tensor, sharded: ShardedBatch, with_gradient: Collection[str]
) -> dict[str, Tensor]:
    """Numbers of each token that has a next one, of whole rows: [B, S - 1] each.

    Traffic per rank: (n - 1) * B * L * 5 numbers over cp, and none back.
    """
    of_tokens = token_statistics(logits, targets)
    numbers = {
        "log_probs": token_log_probs(logits, targets),
        "entropy": of_tokens.entropy,
        "mean_logits": of_tokens.mean_logits,
        "is_top1": of_tokens.is_top1,
        "log_sum_sq_probs": of_tokens.log_sum_sq_probs,
    }
    if "entropy" in with_gradient:
        numbers["entropy"] = token_entropy(logits, targets)
    stacked = torch.stack(tuple(numbers.values()), dim=-1)
    whole = sharded.gather(stacked, replicated_loss=True)[:, :-1]
    named = dict(zip(numbers, whole.unbind(-1), strict=True))
    named = {key: x if key in with_gradient else x.detach() for key, x in named.items()}
    return {**named, "is_top1": named["is_top1"] > 0}
