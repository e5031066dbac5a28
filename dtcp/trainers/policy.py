"""TRL's GRPOTrainer on a mesh, whose rows others generate: a cp and tp group is one process.

A policy trainer asks for completions, has them judged, and compares those of one prompt. In each
group the first rank asks and judges: the others would draw other samples. The loss is TRL's own, of
log-probabilities that all ranks of a group have whole.
"""

import pickle
import warnings
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from dtcp.distributed.mesh import ParallelMesh
from dtcp.trainers.policy_arguments import trains_policy
from dtcp.trainers.rewards import (
    FAILURES,
    FirstRankJudges,
    described,
    from_first_rank,
    is_first_rank,
)


class PolicyRows:
    """What a policy trainer does differently on a mesh; changes nothing in other trainers."""

    mesh: ParallelMesh
    _wrap_model: Callable[[Any], Any]

    # Of the trainer that follows in the order of classes.
    args: Any
    rollout_func: Any
    reward_funcs: Any
    reward_func_names: Any
    use_vllm: bool
    vllm_generation: Any
    num_iterations: int
    _step: int
    _buffered_inputs: Any
    _last_loaded_step: int
    _logs: Any
    _pending_metrics: Any
    _pending_extra_logs: Any

    _sampler: Any = None

    def _count_generated_rows(self) -> None:
        """Set how many rows are generated at once, of all batch ranks: TRL counts all processes.

        Raises:
            ValueError: prompts whose completions would not all be among them.
        """
        args, ranks = self.args, self.mesh.size("batch")
        rows = args.per_device_train_batch_size * args.steps_per_generation * ranks
        counted = {"num_generations": (rows, args.num_generations)}
        if args.do_eval and args.eval_strategy != "no":
            evaluated = args.num_generations_eval or args.num_generations
            counted["num_generations_eval"] = (args.per_device_eval_batch_size * ranks, evaluated)
        for name, (count, each) in counted.items():
            if count % each:
                raise ValueError(
                    f"Completions of one prompt are compared within a batch of all batch ranks, "
                    f"got {name}={each} with {count} rows of {ranks} batch ranks: choose one that "
                    f"divides them, or another batch size or steps_per_generation."
                )
        counted_rows, args.generation_batch_size = args.generation_batch_size, rows
        if counted_rows not in (None, rows) and args.process_index == 0:
            # Nothing says whether a person has set it, or GRPOConfig, which fills it in.
            warnings.warn(
                f"For information: GRPOConfig has generation_batch_size={counted_rows}, by all "
                f"ranks, and those of a cp and tp group generate the same rows, so {ranks} batch "
                f"ranks generate {rows} in steps_per_generation={args.steps_per_generation}. Where "
                f"you have set generation_batch_size: set steps_per_generation in its place.",
                stacklevel=2,
            )

    def _share_rollouts(self, sync_weights: Callable[[Any], None] | None) -> None:
        """Give ranks of a group the rollouts, logs and random numbers of the first of them.

        Args:
            sync_weights: sends weights to the generator, before rollouts that follow a step; all
                ranks call it.
        """
        from accelerate.utils import set_seed

        ask = _asked_by_first_rank(self.rollout_func, self.mesh)
        self.rollout_func = ask if sync_weights is None else _synced(ask, sync_weights)
        if self.args.use_vllm:
            self.use_vllm, self._last_loaded_step = True, -1
            self.vllm_generation = SimpleNamespace(sync_weights=lambda: None)
        for name, log in self._logs.items():
            if isinstance(log, deque):
                self._logs[name] = _LogOfFirstRanks(self.mesh, log.maxlen)
        self._logs["extra"] = defaultdict(
            lambda: _LogOfFirstRanks(self.mesh, self.args.generation_batch_size)
        )
        # Advantages are those of all batch ranks already.
        self._logs["advantages"] = deque(maxlen=self.args.generation_batch_size)
        set_seed(self.args.seed + self.mesh.rank("batch"))

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        rows = super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        # Rows are shuffled next: a rollout or a judge may have drawn random numbers on the first
        # rank alone.
        torch.set_rng_state(from_first_rank(torch.get_rng_state(), self.mesh))
        return rows

    def _calculate_rewards(self, inputs: Any, prompts: Any, *args: Any) -> Tensor:
        """Of the rows of all batch ranks, as the first rank of each group has them judged.

        The same holds for what its reward functions log: a metric may choose the best checkpoint.

        Raises:
            RuntimeError: on all ranks, where a reward function fails; there, what it raised.
            ValueError: columns of log_extra of other lengths on some batch ranks.
        """

        def logged() -> Any:
            metrics = {name: [float(x) for x in log] for name, log in self._pending_metrics.items()}
            return metrics, dict(self._pending_extra_logs)

        judges = FirstRankJudges(self.mesh, len(prompts))
        own = self.reward_funcs
        self.reward_funcs = judges.around(own, self.reward_func_names)
        try:
            of_all_ranks = super()._calculate_rewards(inputs, prompts, *args)  # type: ignore[misc]
        finally:
            self.reward_funcs = own
        metrics, columns = judges.share(logged)
        self._pending_metrics = defaultdict(list, metrics)
        self._pending_extra_logs = defaultdict(list, columns)
        return torch.cat(_parts_of_first_ranks(self.mesh, of_all_ranks))

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        self._sampler = super()._get_train_sampler(*args, **kwargs)  # type: ignore[misc]
        return self._sampler

    def _init_training_state(self, *args: Any) -> tuple[int, int]:
        """Count micro-batches on from the checkpoint, where TRL starts from 0.

        It would ask for completions in the middle of the micro-batches that share the same prompts.
        Its sampler draws each epoch's prompts from numbers that carry on, and starts anew, too.
        """
        epochs, passed = super()._init_training_state(*args)  # type: ignore[misc]
        if not trains_policy(type(self)):
            return epochs, passed
        self._step, self._buffered_inputs = passed, None
        if self._sampler is not None:  # an iterable dataset has none
            for _ in range(epochs):
                next(iter(self._sampler), None)
        each = self.args.steps_per_generation * self.num_iterations
        if passed % each and self.args.process_index == 0:
            warnings.warn(
                f"A checkpoint has no completions, got one of {passed % each} micro-batches of "
                f"{each} that learn from the same completions: the others learn from new ones. "
                f"Save where steps times gradient_accumulation_steps are a multiple of {each}.",
                stacklevel=2,
            )
        return epochs, passed

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        rows = self._wrap_model(model)
        return super()._get_per_token_logps_and_entropies(rows, *args, **kwargs)  # type: ignore[misc]


class _LogOfFirstRanks(deque[Any]):
    """Takes what was gathered from all ranks, and keeps the part of each group's first one."""

    def __init__(self, mesh: ParallelMesh, length: int | None) -> None:
        super().__init__(maxlen=length)
        self.mesh = mesh

    def extend(self, values: Iterable[Any]) -> None:
        for part in _parts_of_first_ranks(self.mesh, list(values)):
            super().extend(part)


def _parts_of_first_ranks(mesh: ParallelMesh, values: Any) -> list[Any]:
    """The parts of each group's first rank, by batch rank, of values gathered from all ranks."""
    degrees = mesh.degrees
    each, left = divmod(len(values), degrees.world)
    if left:
        raise ValueError(
            f"Every rank logs a value of each of its rows, got {len(values)} values of "
            f"{degrees.world} ranks: give log_extra as many on all of them."
        )
    # tp is the last axis, and cp the one before, whatever they are called.
    first = mesh.device_mesh.mesh.reshape(-1, degrees.cp * degrees.tp)[:, 0].tolist()
    return [values[rank * each : (rank + 1) * each] for rank in first]


def _asked_by_first_rank(ask: Callable[..., Any], mesh: ParallelMesh) -> Callable[..., Any]:
    """A function that the first rank of each cp and tp group calls, for all of its group.

    Raises:
        RuntimeError: on the others, where it fails on the first one, or cannot be pickled there.
    """

    def asked(*args: Any) -> Any:
        pickled, failure = None, None
        if is_first_rank(mesh):
            try:
                pickled = pickle.dumps(ask(*args))
            # The others wait in the broadcast below: whatever a function of the user's raises, they
            # hear of it, and it is raised again.
            except FAILURES as error:
                from_first_rank((None, described(error)), mesh)
                raise
        pickled, failure = from_first_rank((pickled, failure), mesh)
        if failure is not None:
            raise RuntimeError(
                f"The first rank of a cp and tp group calls rollout_func for its group, got its "
                f"{failure}: mend rollout_func."
            )
        return pickle.loads(pickled)

    return asked


def _synced(ask: Callable[..., Any], sync_weights: Callable[[Any], None]) -> Callable[..., Any]:
    """The same, after sending weights that steps have changed since the last call."""
    steps: list[int] = []

    def asked(prompts: Any, trainer: Any) -> Any:
        step = trainer.state.global_step
        if steps != [step]:
            sync_weights(trainer)
            steps[:] = [step]
        return ask(prompts, trainer)

    return asked
