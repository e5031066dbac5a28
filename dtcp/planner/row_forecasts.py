"""The forecasts that a search asks for, each made once, in one process or several."""

import multiprocessing
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace
from functools import cached_property
from typing import TypeVar

import torch
from torch import nn

from dtcp._torch.fakes import fake_ranks
from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.planner.captured_warnings import captured_warnings
from dtcp.planner.forecast import RowForecast, chosen_ranks, forecast_row, row_degrees
from dtcp.planner.peak import least_memory
from dtcp.planner.setup import Setup
from dtcp.planner.sharded_weights import Unit
from dtcp.planner.step import experts_of, place_model
from dtcp.planner.subject import Subject
from dtcp.softmax import AllGatherAttention, RingAttention
from dtcp.softmax.style import AttentionStyle

T = TypeVar("T")
Outcome = RowForecast | ValueError | TypeError
SAID_OF = 4
"""Forecasts from one word of progress to the next; each takes seconds where experts are many."""


class RowForecasts:
    """Forecasts of one model's steps on the ranks of a row, by setup.

    What a row's ranks do depends neither on how many rows there are nor on how weights are sharded,
    so many meshes share a forecast.

    Args:
        processes: forked from this one, each making one forecast at a time; 1 forks none.
    """

    def __init__(self, subject: Subject, processes: int = 1) -> None:
        self.subject = subject
        self._known: dict[Hashable, Outcome] = {}
        self._units: dict[Hashable, list[Unit] | ValueError | TypeError] = {}
        self._pool = _pool(processes) if processes > 1 else None

    def at(self, setup: Setup) -> RowForecast:
        """Raises ValueError, TypeError: the model does not take this setup."""
        key = _key(setup)
        if key not in self._known:
            self._known[key] = _forecast_or_refusal(self.subject, setup)
        return _or_raise(self._known[key])

    def prepare(self, setups: Iterable[Setup], say: Callable[[str], None]) -> None:
        """Make these forecasts side by side; without processes, each is made when asked for.

        Args:
            say: hears how far it has come.
        """
        if self._pool is None:
            return
        running: dict[Hashable, Future[Outcome]] = {}
        for setup in setups:
            key = _key(setup)
            if key not in self._known and key not in running:
                running[key] = self._pool.submit(_forecast_or_refusal, self.subject, setup)
        for number, (key, future) in enumerate(running.items(), start=1):
            self._known[key] = future.result()
            if number % SAID_OF == 0 and number < len(running):
                say(f"has traced {number} of {len(running)} steps")

    def close(self) -> None:
        """End the processes."""
        if self._pool is not None:
            self._pool.shutdown()

    def count(self, setups: Iterable[Setup]) -> int:
        """How many forecasts these setups need."""
        return len({_key(setup) for setup in setups})

    def least(self, setup: Setup) -> int:
        """Bytes of a rank at least, from its weights alone: see `least_memory`.

        Raises:
            ValueError, TypeError: the model does not take this mesh.
        """
        return least_memory(self.units(setup), setup)

    def units(self, setup: Setup) -> list[Unit]:
        """The weights of a rank, known before a step is run.

        Raises:
            ValueError, TypeError: the model does not take this mesh.
        """
        degrees = setup.degrees
        key = (degrees.tp, degrees.ep, degrees.etp, setup.precision, setup.reshard)
        if key not in self._units:
            one_row = replace(degrees, dp_replicate=1, dp_shard=degrees.ep, cp=1)
            alone = replace(setup, degrees=one_row)
            self._units[key] = _units_or_refusal(self.subject, alone)
        return _or_raise(self._units[key])

    @cached_property
    def expert_counts(self) -> frozenset[int]:
        """How many experts the model's layers choose from.

        Raises ValueError, TypeError: the model is not built.
        """

        def build() -> list[nn.Module]:
            with torch.device("meta"):
                return experts_of(self.subject.build())

        experts_of_layers = _or_raise(_or_refusal(self.subject, build))
        return frozenset(int(getattr(experts, "num_experts", 0)) for experts in experts_of_layers)

    @cached_property
    def reads_strategy(self) -> bool:
        """Whether any mixer is carried out by the strategy that is asked for."""
        plans = []
        with captured_warnings(), fake_ranks(2, 0), torch.device("meta"):
            mesh = ParallelMesh.from_degrees(Degrees(cp=2), "cpu")
            for attention in (RingAttention(), AllGatherAttention()):

                def styles(attention: AttentionStyle = attention) -> str:
                    model = self.subject.build()
                    return repr(self.subject.plan(model, mesh, attention, Setup.layout).cp)

                plan_or_refusal = _or_refusal(self.subject, styles)
                if not isinstance(plan_or_refusal, str):
                    return True
                plans.append(plan_or_refusal)
        return plans[0] != plans[1]


def _forecast_or_refusal(subject: Subject, setup: Setup) -> Outcome:
    """A forecast of a row, or why there is none."""
    return _or_refusal(
        subject, lambda: forecast_row(subject, setup, chosen_ranks(setup.degrees.cp))
    )


def _or_refusal(subject: Subject, work: Callable[[], T]) -> T | ValueError | TypeError:
    """What the work returns, or why the model does not take it."""
    try:
        return work()
    except (ValueError, TypeError) as error:
        return error
    except Exception as error:  # noqa: BLE001
        # The work builds, places or runs a model, which is code of the user's or of transformers
        # and raises any class. The search goes on with other setups and reports this one as
        # refused, with this error; where it was the only one, or none is left, it is raised
        # (`_or_raise`). No BaseException: Ctrl-C ends it.
        return _unknown_step(subject, error)


def _unknown_step(subject: Subject, error: Exception) -> ValueError:
    said = next(iter(str(error).strip().splitlines()), "")
    return ValueError(
        f"A step is run on tensors without data, got {type(error).__name__} from {subject.name} "
        f"({said}): run python -m dtcp.check on the model, which says what it needs."
    )


def _units_or_refusal(subject: Subject, setup: Setup) -> list[Unit] | ValueError | TypeError:
    def units() -> list[Unit]:
        degrees = row_degrees(setup.degrees)
        # The forecast of a row of this mesh repeats these warnings.
        with captured_warnings(), fake_ranks(degrees.world, 0):
            mesh = ParallelMesh.from_degrees(degrees, "cpu")
            return place_model(subject, mesh, setup).units(setup, mesh.experts)

    return _or_refusal(subject, units)


def _or_raise(outcome: T | ValueError | TypeError) -> T:
    if isinstance(outcome, ValueError | TypeError):
        raise outcome
    return outcome


def _key(setup: Setup) -> Hashable:
    degrees = row_degrees(setup.degrees)
    kind = (setup.layout, repr(setup.attention), setup.checkpoint, setup.precision, setup.reshard)
    nodes = setup.ranks_per_node if setup.ranks_per_node < degrees.world else 0
    return degrees, setup.documents, nodes, kind


def _pool(processes: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(processes, multiprocessing.get_context("fork"))
