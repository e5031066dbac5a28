"""transformers' Trainer, and those of TRL, over a dtcp mesh.

What such a trainer knows of parallelism it asks its Accelerator, and it calls its model with whole
rows. So the model gets a module around it that takes whole rows (`WholeRows`), the Accelerator
counts a cp and tp group as one process (`MeshAccelerator`), and files are written and read by all
ranks together (`SharedFiles`). Everything else, from arguments to callbacks, is the trainer's own.
"""

import inspect
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from dtcp.distributed.gathered import free_gathered
from dtcp.distributed.mesh import ParallelMesh, check_no_stages, check_parallel_mesh
from dtcp.forward import wrap_forward
from dtcp.huggingface.documents import documents_of_hf_batch
from dtcp.huggingface.row_heads import gives_rows
from dtcp.huggingface.whole_rows import WholeRows
from dtcp.labels import IGNORED, shift_labels
from dtcp.parallelize import parallelize_hf
from dtcp.parallelize.plans.adapters import adapted_model
from dtcp.sequence.buckets import Buckets
from dtcp.sequence.layout import HeadTail, SequenceLayout
from dtcp.trainers.accelerator import MeshAccelerator
from dtcp.trainers.arguments import (
    asked_of_placing,
    check_callbacks,
    check_given_optimizer,
    check_launch,
    check_optimizer_name,
    check_parts_of_loss,
    check_placed_as_asked,
    check_reference,
    check_trained_model,
    check_trainer,
    check_training_arguments,
    computes_on_rows,
    is_on_mesh,
    smooths_by_itself,
)
from dtcp.trainers.cached_reference import shards_for_hashes, with_reference_log_probs
from dtcp.trainers.decisions import SharedDecisions, share_callbacks
from dtcp.trainers.evaluation import SharedEvaluation
from dtcp.trainers.policy import PolicyRows
from dtcp.trainers.policy_arguments import (
    arguments_by_name,
    check_made_policy,
    check_policy,
    trains_policy,
)
from dtcp.trainers.repeated_rows import ignore_repeated
from dtcp.trainers.saved import SharedFiles, as_batch_rank
from dtcp.trainers.streams import read_whole


class MeshTrainerMixin(PolicyRows, SharedDecisions, SharedEvaluation, SharedFiles):
    """Put before a trainer's class: `class Trainer(MeshTrainerMixin, transformers.Trainer)`.

    Args:
        mesh: batch ranks read different rows, ranks of a cp and tp group the same.
        model, ref_model, model_init: of parallelize_hf, or as transformers builds models, the same
            on all ranks: such a one is put on the mesh once the trainer has put adapters into it
            (peft_config).
        place: puts such a model on the mesh, in place, as parallelize_hf(model, mesh) does; with
            compile=Compile(..) besides where torch_compile is set.
        layout, buckets: as for shard_hf_batch.
        z_loss, linear_head: as for WholeRows.
        sync_weights: for GRPOTrainer; takes weights to who generates, given the trainer. All ranks
            call it, before rollouts that follow a step.

    Gradients are those of one process with the same rows: losses are divided by the tokens of all
    ranks and all micro-batches. Every other argument is the trainer's; one that the mesh would not
    carry out is refused.

    Raises:
        TypeError, ValueError: no model, a trainer of TRL that generates, arguments that a mesh
            would ignore, or a process group of other ranks than the mesh has.
    """

    # Of the trainer that follows in the order of classes.
    model: Any
    args: Any
    accelerator: Any
    callback_handler: Any
    optimizer: Any
    optimizer_cls_and_kwargs: Any
    compute_loss_func: Any
    _prepare_inputs: Callable[[Any], Any]
    _train_batch_size: int
    _signature_columns: Any
    _loss_shifts_labels: bool
    model_accepts_loss_kwargs: bool

    def __init__(
        self,
        *args: Any,
        mesh: ParallelMesh,
        place: Callable[..., Any] = parallelize_hf,
        layout: type[SequenceLayout] = HeadTail,
        buckets: Buckets | None = None,
        z_loss: float = 0.0,
        linear_head: bool = False,
        sync_weights: Callable[[Any], None] | None = None,
        **kwargs: Any,
    ) -> None:
        check_parallel_mesh("A Trainer on a mesh", mesh)
        check_no_stages("A Trainer", mesh.degrees)
        check_trainer(type(self))
        self.mesh = mesh
        self._rows_options: dict[str, Any] = {
            "buckets": buckets,
            "z_loss": z_loss,
            "linear_head": linear_head,
        }
        self._layout, self._place = layout, place
        self._rows: WholeRows | None = None
        self._counted: Tensor | None = None
        self._checks_count = True
        self._gives_logits = False
        self._sync_weights = sync_weights
        classes = type(self).__mro__
        following = classes[classes.index(MeshTrainerMixin) + 1 :]
        named = arguments_by_name(following, args, kwargs)
        check_callbacks(named.get("callbacks") or ())
        check_reference(type(self), named)
        check_policy(type(self), named, sync_weights)
        with ExitStack() as self._while_made:
            for each in (*args, *kwargs.values()):
                if isinstance(each, nn.Module):
                    self._while_made.enter_context(shards_for_hashes(each))
            super().__init__(*args, **kwargs)
        share_callbacks(self.callback_handler, self.mesh, self.args.device)
        check_given_optimizer(self.optimizer, self.model)
        if self.optimizer is None and self.optimizer_cls_and_kwargs is None:
            check_optimizer_name(self.args)
        of_tokens = not gives_rows(self.model)
        if of_tokens and not smooths_by_itself(type(self)):
            self.label_smoother = None  # the model's loss has it
        check_parts_of_loss(self, z_loss, of_tokens=of_tokens)
        if trains_policy(type(self)):
            self._share_rollouts(sync_weights)

    def add_callback(self, callback: Any) -> None:
        check_callbacks([callback])
        super().add_callback(callback)  # type: ignore[misc]

    def create_accelerator_and_postprocess(self) -> None:
        check_training_arguments(self.args, self.mesh)
        if trains_policy(type(self)):
            check_made_policy(self, self._sync_weights)
            self.use_vllm = False  # until it is made: it would connect to a server
        super().create_accelerator_and_postprocess()  # type: ignore[misc]
        check_launch(self.accelerator, self.mesh)
        MeshAccelerator.adopt(self.accelerator, self.mesh, self._rows_of, self._lay_out_ahead)
        if not smooths_by_itself(type(self)):
            self._rows_options["label_smoothing"] = self.args.label_smoothing_factor
        self._rows_options["autocast"] = torch.bfloat16 if self.args.bf16 else None
        if trains_policy(type(self)):
            self._count_generated_rows()
            self._rows_options["temperature"] = self.args.temperature
            rewarded = self.args.entropy_coef != 0 or self.args.use_adaptive_entropy
            self._rows_options["entropy_gradient"] = rewarded
        if self.model is not None:
            self._put_on_mesh(self.model)
            self._while_made.enter_context(shards_for_hashes(self.model))

    def _put_on_mesh(self, model: Any) -> Any:
        """The model itself, on the mesh."""
        check_trained_model(model)
        if is_on_mesh(model):
            check_placed_as_asked(self.args, model)
        else:
            self._place(model, self.mesh, **asked_of_placing(self.args))
        # What the trainer reads off a forward, which has something around it now.
        adapted_model(model).accepts_loss_kwargs = not gives_rows(model)
        return model

    def call_model_init(self, trial: Any = None) -> Any:
        return self._put_on_mesh(super().call_model_init(trial))  # type: ignore[misc]

    def get_total_train_batch_size(self, args: Any) -> int:
        """Rows of a step, of all batch ranks."""
        rows: int = self._train_batch_size * args.gradient_accumulation_steps
        return rows * self.mesh.size("batch")

    def floating_point_ops(self, inputs: Any) -> float:
        """This rank's part of the group's, whose ranks the trainer adds up."""
        whole: float = super().floating_point_ops(inputs)  # type: ignore[misc]
        return whole / (self.mesh.size("cp") * self.mesh.size("tp"))

    def _get_dataloader(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Whose workers draw the same random numbers on all ranks of a cp and tp group."""
        with as_batch_rank(self):
            return super()._get_dataloader(read_whole(dataset), *args, **kwargs)  # type: ignore[misc]

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Of the parameters as they are sharded, whatever the model was evaluated on."""
        free_gathered(self.model)
        return super().create_optimizer(*args, **kwargs)  # type: ignore[misc]

    @property
    def rows_model(self) -> WholeRows:
        """The model as it is called with whole rows, on all ranks of a cp and tp group together."""
        return self._wrap_model(self.model)

    # Rows stay on the host until they are cut, but for a loss that is computed of them, too.

    def _prepare_input(self, data: Any) -> Any:
        if self._gives_logits or self.compute_loss_func or computes_on_rows(type(self)):
            return super()._prepare_input(data)  # type: ignore[misc]
        return data

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """parallelize_hf has placed it."""

    def _wrap_model(self, model: Any, training: bool = True, dataloader: Any = None) -> WholeRows:
        if isinstance(model, WholeRows):
            return model
        if self._rows is None or self._rows.module is not model:
            self._rows = self._rows_of(model)
        return self._rows

    def _rows_of(self, model: Any) -> WholeRows:
        """A model, the reference of a preference loss as well, as the trainer calls it."""
        rows = WholeRows(
            self._put_on_mesh(model),
            self.mesh,
            self._layout,
            device=self.args.device,
            **self._rows_options,
        )
        if adapted_model(model) is not model and _ROWS not in vars(model):
            # Trainers call it by itself, too, with its adapters switched off.
            wrap_forward(model, _on_whole_rows)
        vars(model)[_ROWS] = rows
        return rows

    def _lay_out_ahead(self, batch: Any) -> None:
        """Rows as the loader has them, while the step before them runs."""
        if isinstance(batch, Mapping):
            self._wrap_model(self.model).prepare_ahead(batch)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        if "input_ids" not in self._signature_columns and "kwargs" in self._signature_columns:
            # Read off a forward with something around it, which takes anything.
            forward = type(adapted_model(self.model)).forward
            self._signature_columns += list(inspect.signature(forward).parameters)

    # Losses.

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """Tokens with a loss in all micro-batches of all batch ranks: no document's first token."""
        if batch_samples:
            self._ignore_repeated(batch_samples[-1])
        asked = self.model_accepts_loss_kwargs or self.compute_loss_func is not None
        if not batch_samples or not asked or not self._shifts(batch_samples[0]):
            return super()._get_num_items_in_batch(batch_samples, device)
        count = torch.zeros((), dtype=torch.int64)
        for batch in batch_samples:
            labels = shift_labels(batch["labels"], documents_of_hf_batch(batch))
            count += (labels != IGNORED).sum()
        self._counted = self.accelerator.gather(count.to(device)).sum()
        return self._counted

    def _ignore_repeated(self, batch: Any) -> None:
        state = self.accelerator.gradient_state
        of_tokens = self.model_accepts_loss_kwargs and isinstance(batch, Mapping)
        if of_tokens and ignore_repeated(batch, state, self.mesh):
            self._lay_out_ahead(batch)  # anew

    def _shifts(self, batch: Any) -> bool:
        labeled = isinstance(batch, Mapping) and batch.get("labels") is not None
        return bool(self._loss_shifts_labels) and labeled

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        if self._checks_count and num_items_in_batch is not None and self._counted is not None:
            self._checks_count = False  # reading it makes the host wait
            if int(num_items_in_batch) != int(self._counted):
                raise ValueError(
                    f"A loss is divided by the tokens of all batch ranks, each counted once, got "
                    f"num_items_in_batch={int(num_items_in_batch)} where there are "
                    f"{int(self._counted)}: leave get_batch_samples as it is, or count the rows of "
                    f"one rank of each cp and tp group."
                )
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        return loss

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if self.compute_loss_func is not None:
            inputs = dict(inputs)
        return super().compute_loss(self._wrap_model(model), inputs, *args, **kwargs)

    def compute_ref_log_probs(self, model: Any, inputs: Any) -> Any:
        """Of DPOTrainer: a reference model is called with whole rows, too."""
        return super().compute_ref_log_probs(self._wrap_model(model), inputs)  # type: ignore[misc]

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """Of DPOTrainer and KTOTrainer: the reference's numbers of all rows, on every rank."""
        return with_reference_log_probs(self, dataset, batch_size, self._prepare_inputs)


_ROWS = "dtcp_rows"


def _on_whole_rows(model: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if "attn_metadata" in kwargs:
        return forward(*args, **kwargs)
    return vars(model)[_ROWS](*args, **kwargs)
