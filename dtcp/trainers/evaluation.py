"""The loss of an evaluation: that of the rows of all batch ranks, as one process has it."""

from collections.abc import Callable
from typing import Any

from dtcp.distributed.mesh import ParallelMesh
from dtcp.huggingface.whole_rows import WholeRows
from dtcp.trainers.arguments import smooths_by_itself


class SharedEvaluation:
    """A Trainer whose batch ranks evaluate together."""

    mesh: ParallelMesh

    # Of the trainer that follows in the order of classes, and of the mixin.
    args: Any
    accelerator: Any
    compute_loss_func: Any
    current_gradient_accumulation_steps: int = 1
    _wrap_model: Callable[[Any], WholeRows]
    _ignore_repeated: Callable[[Any], None]
    _get_num_items_in_batch: Callable[[list[Any], Any], Any]
    _gives_logits: bool

    _counts_evaluated: bool = False
    """Whether losses that are a mean of a rank's tokens are to be shares of all ranks' mean."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if self._counts_evaluated and num_items_in_batch is None:
            num_items_in_batch = self._get_num_items_in_batch([inputs], self.args.device)
        return super().compute_loss(  # type: ignore[misc]
            model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
        )

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> Any:
        rows = self._wrap_model(model)
        rows.gathers_logits = self._gives_logits = not prediction_loss_only
        rows.gave_share = False
        self._ignore_repeated(inputs)
        # SFTTrainer takes the mean over a rank's own tokens, of which ranks have more or fewer.
        own_mean = smooths_by_itself(type(self)) and self.compute_loss_func is None
        self._counts_evaluated = own_mean and self.mesh.batch is not None
        # By which it divides the balance loss of experts, where tokens are counted.
        steps, self.current_gradient_accumulation_steps = (
            self.current_gradient_accumulation_steps,
            1,
        )
        try:
            loss, *others = super().prediction_step(  # type: ignore[misc]
                rows, inputs, prediction_loss_only, ignore_keys=ignore_keys
            )
            is_share = rows.gave_share or self._counts_evaluated
            if loss is not None and is_share and self.mesh.batch is not None:
                # Of the rows of all batch ranks, as one process has it: some are not counted.
                loss = self.accelerator.gather(loss).mean()
            return (loss, *others)
        finally:
            rows.gathers_logits = self._gives_logits = self._counts_evaluated = False
            self.current_gradient_accumulation_steps = steps
