"""torchtitan's Trainer, with the batch cut for context parallelism before the model sees it.

Between the data loader and the model stands what `shard_batch` does: labels are shifted per
document already, the row is laid out, and each rank keeps its tokens, with what its mixers need to
know (dtcp/pretrain/batches.py).
The loss stays torchtitan's: the sum over local tokens, divided by the global count of valid ones.
"""

import json
import math
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from signal import Signals
from typing import Any

from dtcp.torchtitan.hf_model import SEED
from dtcp.torchtitan.parallelize import mesh_with_section
from dtcp.torchtitan.section import Section

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torchtitan import trainer as titan
from torchtitan.components.dataloader import DataloaderExhaustedError
from torchtitan.distributed import ParallelDims

from dtcp.copied_weights import CopiedWeights
from dtcp.distributed.mesh import ParallelMesh
from dtcp.distributed.random_weights import WholeDraws
from dtcp.experts import RouterLoss
from dtcp.microbatches import step_microbatches
from dtcp.pretrain.batches import (
    BatchPreparation,
    LocalBatch,
    forward_names,
    only_prepared,
)
from dtcp.pretrain.config_check import check_by_torchtitan, check_settings
from dtcp.pretrain.data import PackedDocuments, open_source
from dtcp.pretrain.dry_run import is_dry
from dtcp.pretrain.expected import Expectation, expectation, subject_of
from dtcp.pretrain.folder_lock import FolderLock
from dtcp.pretrain.launch import ranks_of_machine
from dtcp.pretrain.output_folder import check_output
from dtcp.pretrain.progress import describe_run, say
from dtcp.pretrain.same_start import (
    refuse_other_code,
    refuse_other_data,
    refuse_other_folder,
    refuse_other_nodes,
    refuse_other_settings,
)
from dtcp.pretrain.settings import check_counts, check_optimizer, check_profiler
from dtcp.pretrain.sources import TextFiles
from dtcp.pretrain.stage_optimizers import check_groups, groups_of_stages
from dtcp.pretrain.staged import check_stages, loss_of_stages
from dtcp.pretrain.start_weights import check_start
from dtcp.pretrain.stop import StopRequest
from dtcp.pretrain.text_files import DataError
from dtcp.pretrain.tokenizer import Tokenizer, check_tokenizer_folder
from dtcp.pretrain.validation_data import describe_validation, validates
from dtcp.pretrain.without_effect import check_effects
from dtcp.token_dropout import TokenDropout, step_seed


class Trainer(titan.Trainer):
    """torchtitan's Trainer over a dtcp mesh."""

    @dataclass(kw_only=True, slots=True)
    class Config(titan.Trainer.Config):
        dtcp: Section = field(default_factory=Section)

        def check(self) -> None:
            """Refuse what cannot work before any rank starts.

            Raises:
                ValueError: data that is not there, or a part that another part does not honour.
            """
            check_settings(self)
            check_effects(self)
            check_counts(self)
            check_stages(self)
            check_optimizer(self)
            check_profiler(self.profiler)
            check_by_torchtitan(self)
            _check_data(self)
            check_start(self)
            check_output(self)
            if self.dtcp.is_open or self.dtcp.forecast:
                subject_of(self)

        def maybe_log(self) -> None:
            titan.Trainer.Config.maybe_log(self)
            if self.debug.print_config:
                say(json.dumps(self.to_dict(), indent=2, ensure_ascii=False))

    mesh: ParallelMesh
    preparation: BatchPreparation
    resumed_step: int = 0
    stopped_by: int = 0
    """The signal that all ranks stopped for; 0 where none did."""
    expected: Expectation | None = None
    lock: FolderLock | None = None
    """Rank 0's right to write the run's folder."""
    has_stepped: bool = False
    """Whether this process has taken a step."""
    copied: CopiedWeights | None = None
    """Of pipeline stages that hold some weights together."""
    parts_run: int = 0
    """Of a step: how often the schedule has run."""
    drops: bool = False
    """Whether its model drops by token: by numbers that follow the step, so that a resume does."""
    step_read: tuple[str, ...] = ()
    """First and last document of each micro-batch of a step."""

    def __init__(self, config: Config) -> None:
        check_settings(config)
        # torchtitan gives parallelize_fn its own sections only.
        spec, each = config.model_spec, config.dtcp.ranks_per_node or ranks_of_machine()
        section = replace(config.dtcp, ranks_per_node=each)
        bound = {"parallelize_fn": partial(spec.parallelize_fn, section=section)}
        if spec.pipelining_fn is not None:
            bound["pipelining_fn"] = partial(spec.pipelining_fn, section=section)
        staged = config.parallelism.pipeline_parallel_degree > 1
        with WholeDraws(), groups_of_stages() if staged else nullcontext() as groups:
            super().__init__(replace(config, model_spec=replace(spec, **bound)))
        self.mesh = mesh_with_section(self.parallel_dims, section)
        if groups is not None:
            check_groups(config.optimizer.param_groups, groups, self.mesh.pp)
        if isinstance(self.dataloader, PackedDocuments) and not is_dry(config):
            refuse_other_data(self.dataloader.fingerprint())
        self._check_vocabulary()
        self._check_validation()
        in_step = self.gradient_accumulation_steps * self.num_pipeline_parallel_microbatches
        for part in self.model_parts:
            share_router_losses(part, in_step)
        own = self.model_parts
        self.drops = any(isinstance(x, TokenDropout) for part in own for x in part.modules())
        parts = (self.mesh, config.dtcp, own[0] if len(own) == 1 else nn.ModuleList(own))
        self.preparation = BatchPreparation(*parts, training=True)
        if self.mesh.pp is not None and own[0].stage.copied:
            self._share_weights()
        if config.validator.enable:
            self.validator.preparation = BatchPreparation(*parts, training=False)
            if self.mesh.pp is not None:
                self.validator.run_stages(self.pp_schedule, own, self.mesh.pp)
        if isinstance(self.dataloader, PackedDocuments):
            self.dataloader.prepare = self.preparation.ahead
        say(describe_run(self, describe_validation(config)))
        if config.dtcp.forecast:
            self.expected = expectation(config, self.mesh, self.gradient_accumulation_steps)
            self.metrics_processor.is_held = True
            say(self.expected.lines())

    def _share_weights(self) -> None:
        """Let stages train the weights that several hold as one."""
        copied = CopiedWeights(self.pp_schedule, self.model_parts[0].stage.copied)
        for copy in copied.copies():
            copy.requires_grad_()  # optimizers have been built, without it
        copied.refresh()
        self.optimizers.register_step_post_hook(lambda *_, **__: copied.refresh())
        self.copied = copied

    def init_distributed(self) -> ParallelDims:
        dims: ParallelDims = super().init_distributed()
        if not is_dry(self.config):
            # Before meshes and models, which may need others.
            refuse_other_code()
            refuse_other_settings(self.config)
            each = self.config.dtcp.ranks_per_node or ranks_of_machine()
            refuse_other_nodes(self.config.parallelism, each)
            if _saves(self.config):
                refuse_other_folder(Path(self.config.dump_folder))
        return dims

    def train(self) -> None:
        """Train to the last step; or to a signal or the end of the data, and save there."""
        self.stop = StopRequest(timedelta(seconds=self.config.comm.init_timeout_seconds))
        self._out_of_data = False
        try:
            with self.stop.asked_of_all():
                super().train()
                self.stop.settle()
        finally:
            self.stop.close()
        if self._out_of_data:
            self._end_with_data()
        elif self.stop.signal and super().should_continue_training():
            self._end_with_signal(self.stop.signal)

    def should_continue_training(self) -> bool:
        if self.lock is not None:
            self.lock.check()
        return super().should_continue_training() and not self.stop.agreed()

    def batch_generator(
        self, data_iterable: Iterable[tuple[dict[str, Any], Tensor]]
    ) -> Iterator[tuple[dict[str, Any], Tensor]]:
        """The loader's batches; an error of the data says in which step it came up."""
        batches = super().batch_generator(data_iterable)
        while True:
            try:
                batch = next(batches)
            except DataloaderExhaustedError:
                self._out_of_data = True
                raise
            except DataError as error:
                # Every rank reads every row, and says the same.
                raise DataError(f"{error} (read on all ranks for step {self.step})") from error
            if isinstance(self.dataloader, PackedDocuments):
                self.metrics_processor.row_work.append(self.dataloader.last_work)
                self.step_read += self.dataloader.last_read
            yield only_prepared(*batch)

    def _end_with_data(self) -> None:
        self.step -= 1  # the step that found no rows
        say(f"end of data after step {self.step}; rows for {self.config.training.steps} were due")
        if self.step > self.resumed_step:
            self.checkpointer.save(self.step, last_step=True)

    def _end_with_signal(self, number: int) -> None:
        self.stopped_by = number
        saved = self.checkpointer.save_now(self.step)
        left = "start again to go on" if saved else "nothing was saved, as the config wants it"
        say(f"stopped     by {Signals(number).name} after step {self.step}; {left}")

    def post_dataloading_process(self, input_dict: dict[str, Any], labels: Tensor) -> LocalBatch:
        batch = self.preparation.local(input_dict, labels, labels.device)
        self.ntokens_seen += batch[0].numel()
        if self.expected is not None:
            metadata = batch[2][forward_names(self.model_parts[0])[1]]
            self.metrics_processor.expected += self.expected.received(metadata)
        return batch

    def train_step(self, data_iterator: Iterator[tuple[dict[str, Any], Tensor]]) -> None:
        """One step of torchtitan's; where its loss is not finite, say what can be done."""
        if self.config.validator.enable and self.validator.should_validate(self.step):
            self.validator.read_ahead()
        if self.copied is not None and not self.has_stepped:
            self.copied.refresh()  # of what was loaded
        self.metrics_processor.row_losses.clear()
        self.step_read, self.parts_run = (), 0
        if self.drops:
            seed = self.config.debug.seed
            torch.manual_seed(step_seed(SEED if seed is None else seed, self.step))
        try:
            super().train_step(data_iterator)
        except RuntimeError as error:
            if "Loss is not finite" not in str(error):
                raise
            if is_dry(self.config):
                self.metrics_processor.log(self.step, *[math.nan] * 3)
                return
            raise ValueError(
                f"A loss is finite, got NaN or infinity at step={self.step}: no rank goes on, and "
                f"nothing was saved since. {self.checkpointer.newest()}; lower the learning rate, "
                f"or look at the data of this step{self._data_read()}."
            ) from error
        self.has_stepped = True

    def forward_backward_step(
        self, *, input_dict: Any, labels: Any, global_valid_tokens: Tensor
    ) -> Tensor:
        batch = {"input_dict": input_dict, "labels": labels}
        loss: Tensor = super().forward_backward_step(
            **batch, global_valid_tokens=global_valid_tokens
        )
        if self.metrics_processor.should_log(self.step):
            whole = torch.cat(labels) if isinstance(labels, list) else labels
            self.metrics_processor.row_losses.add(loss, whole, global_valid_tokens)
        return loss

    def pp_forward_backward_step(
        self,
        *,
        input_dict_mbs: list[dict[str, Any]],
        label_mbs: list[Tensor],
        global_valid_tokens: Tensor,
    ) -> Tensor:
        """Micro-batches through all stages; every one gets the loss, in steps that log it."""
        made = [
            self.post_dataloading_process(*batch)
            for batch in zip(input_dict_mbs, label_mbs, strict=True)
        ]
        with self.train_context():
            losses = step_microbatches(
                self.pp_schedule,
                arg_mbs=[(inputs,) for inputs, _, _ in made],
                kwarg_mbs=[extra for _, _, extra in made],
                target_mbs=[labels for _, labels, _ in made],
                loss_kwargs={"global_valid_tokens": global_valid_tokens},
            )
        self.parts_run += 1
        if self.copied is not None and self.parts_run == self.gradient_accumulation_steps:
            self.copied.add_gradients()
        if not self.metrics_processor.should_log(self.step):
            return torch.zeros((), device=self.device)
        return loss_of_stages(losses, self.mesh.pp, self.device)

    def state_dict(self) -> dict[str, Any]:
        """torchtitan's, with the tokens of all ranks, for another mesh goes on from them.

        As a float: checkpoints of earlier versions have an int, the tokens of one of their ranks.
        """
        state: dict[str, Any] = super().state_dict()
        return state | {"ntokens_seen": float(state["ntokens_seen"] * self._token_ranks())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        seen = state_dict["ntokens_seen"]
        if isinstance(seen, float):
            seen = round(seen / self._token_ranks())
        super().load_state_dict(state_dict | {"ntokens_seen": seen})
        self.resumed_step = self.step
        self.metrics_processor.count_from(self.step)

    def _token_ranks(self) -> int:
        """Ranks that have tokens of their own, as many each."""
        dims = self.parallel_dims
        return int(dims.dp_replicate * dims.dp_shard * dims.cp)

    def _data_read(self) -> str:
        read = self.step_read
        return f": {read[0]} to {read[-1]}" if read else ""

    def _check_vocabulary(self) -> None:
        tokenizer, scored = self.tokenizer, self.model_config.vocab_size
        own = isinstance(tokenizer, Tokenizer)
        largest = tokenizer.largest_id() if own else tokenizer.get_vocab_size() - 1
        if largest >= scored:
            raise ValueError(
                f"A model embeds every token of its tokenizer, got the id {largest} for "
                f"vocab_size={scored}: choose another --tokenizer.folder or config."
            )

    def _check_validation(self) -> None:
        """Refuse on all ranks that some of them validate: the others would not wait for them."""
        enabled = float(self.config.validator.enable)
        bounds = torch.tensor((enabled, -enabled), device=self.device)
        dist.all_reduce(bounds, dist.ReduceOp.MAX)
        if bounds.sum():
            raise ValueError(
                f"Ranks validate together, got some that hold out documents of dataset="
                f"{self.config.dataloader.dataset} and some that do not: copy the same files to "
                f"every machine, or set --validator.no-enable."
            )
        loader = getattr(self.config.validator, "dataloader", None)
        if enabled and isinstance(loader, PackedDocuments.Config) and not is_dry(self.config):
            refuse_other_data(open_source(loader).fingerprint())


def _saves(config: Trainer.Config) -> bool:
    """Whether all ranks write checkpoints."""
    checkpoint = config.checkpoint
    return checkpoint.enable and not checkpoint.load_only and not config.dtcp.verify


def share_router_losses(model: nn.Module, parts: int) -> None:
    """Let routers' losses count once per step, however many micro-batches it is made of."""
    for module in model.modules():
        if isinstance(module, RouterLoss):
            module.parts = parts


def _check_data(config: Trainer.Config) -> None:
    loaders = [config.dataloader]
    if validates(config):
        loaders.append(config.validator.dataloader)
    for loader in loaders:
        if isinstance(loader, PackedDocuments.Config):
            source = open_source(loader)
            if isinstance(source, TextFiles) and source.is_empty():
                raise ValueError(
                    f"A data source has documents, got none for part={loader.part} in "
                    f"{len(source.files)} files of dataset={loader.dataset}: add documents, or set "
                    f"--validator.no-enable where it is validation that has none."
                )
        elif config.dtcp.verify:
            raise ValueError(
                f"Verifying reads the same rows on any number of ranks, got "
                f"dataloader={type(loader).__qualname__}: use PackedDocuments."
            )
    tokenizer = config.tokenizer
    if isinstance(tokenizer, Tokenizer.Config) and tokenizer.folder:
        check_tokenizer_folder(tokenizer.folder)
