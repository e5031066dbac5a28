"""Rewards that the first rank of each cp and tp group has judged, for all of its group.

A judge may be another model, a sandbox, or chance: a group that is one process asks it once.
"""

import asyncio
import functools
import inspect
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed as dist

from dtcp.distributed.groups import rank_of_process
from dtcp.distributed.mesh import ParallelMesh

LOGGED = "log_metric and log_extra"
"""How errors name what reward functions log, where it cannot be pickled."""
FAILURES = (Exception, asyncio.CancelledError)
"""What other ranks hear of, that wait for a user's function: no Ctrl-C, which waits for nobody."""


class FirstRankJudges:
    """Calls reward functions on the first ranks, and holds back what they raise.

    All ranks meet in a gather later in the same function of TRL, where one that left early would be
    missed.
    """

    def __init__(self, mesh: ParallelMesh, rows: int) -> None:
        """Of the rows of this rank."""
        self.mesh, self.rows = mesh, rows
        self.asks = is_first_rank(mesh)
        self.failure: tuple[str, BaseException] | None = None
        self.said = ""

    def around(self, functions: Sequence[Any], names: Sequence[str]) -> list[Any]:
        """Reward functions as TRL may call them on every rank."""
        return [self._around(each, name) for each, name in zip(functions, names, strict=True)]

    def _around(self, judge: Callable[..., Any], name: str) -> Callable[..., Any]:
        def asked(*args: Any, **kwargs: Any) -> list[float]:
            rewards = [0.0] * self.rows
            if self.asks and self.failure is None:
                with self.holding_back(name):
                    rewards = _as_numbers(judge(*args, **kwargs), self.rows)
            return rewards

        async def awaited(*args: Any, **kwargs: Any) -> list[float]:
            rewards = [0.0] * self.rows
            if self.asks and self.failure is None:
                with self.holding_back(name):
                    rewards = _as_numbers(await judge(*args, **kwargs), self.rows)
            return rewards

        return awaited if _is_async(judge) else asked

    @contextmanager
    def holding_back(self, name: str) -> Iterator[None]:
        try:
            yield
        except FAILURES as error:
            if self.failure is None:
                self.failure = name, error
                self.said = f"{described(error)} (of {name!r} on rank {rank_of_process()})"

    def share(self, logged: Callable[[], tuple[Any, dict[str, list[Any]]]]) -> Any:
        """What the first rank's functions have logged, on all ranks of its group.

        Args:
            logged: gives metrics, and columns by name, of this rank.
        Raises:
            RuntimeError: on all ranks, where a function has failed on any; there, what it raised.
            ValueError: columns of which first ranks have different numbers of values.
        """
        own, pickled = None, b""
        if self.asks:
            lengths: dict[str, int] = {}
            with self.holding_back(LOGGED):
                metrics, columns = logged()
                pickled = pickle.dumps((metrics, columns))
                lengths = {name: len(values) for name, values in columns.items()}
            own = (self.said, lengths)
        reports = [report for report in _of_all_ranks(own, self.mesh) if report is not None]
        self._raise([said for said, _ in reports if said])
        _check_columns([lengths for _, lengths in reports], self.rows)
        return pickle.loads(from_first_rank(pickled, self.mesh))

    def _raise(self, failures: list[str]) -> None:
        if self.failure is not None:
            name, error = self.failure
            error.add_note(f"Of {name!r}, which the first rank of a cp and tp group calls.")
            raise error
        if failures:
            raise RuntimeError(
                f"The first rank of each cp and tp group calls reward functions for its group, got "
                f"{'; '.join(failures)}: mend the reward function."
            )


def described(error: BaseException) -> str:
    """An error's type and text; its type alone where it has no text or fails to give it."""
    name = type(error).__name__
    try:
        return f"{name}: {error}" if str(error) else name
    # Its own __str__ fails, in whatever class: the other ranks, which wait for this text, hear of
    # its type, and the error itself is raised on this rank.
    except Exception:  # noqa: BLE001
        return name


def is_first_rank(mesh: ParallelMesh) -> bool:
    """Whether this is the first rank of its cp and tp group, which asks."""
    return mesh.rank("cp") == mesh.rank("tp") == 0


def from_first_rank(value: Any, mesh: ParallelMesh) -> Any:
    """What the first rank of a cp and tp group has, pickled, on all of them."""
    box = [value]
    for axis in (mesh.cp, mesh.tp):
        if axis is not None:
            dist.broadcast_object_list(box, group=axis.get_group(), group_src=0)
    return box[0]


def _of_all_ranks(value: Any, mesh: ParallelMesh) -> list[Any]:
    values = [value] * mesh.degrees.world
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def _as_numbers(rewards: Any, rows: int) -> list[float]:
    """Rewards as TRL reads them, None included, so that what it refuses is raised here."""
    numbers = [torch.nan if each is None else each for each in rewards]
    of_rows = torch.tensor(numbers, dtype=torch.float32)
    if of_rows.shape != (rows,):
        raise ValueError(
            f"A reward function gives each completion a number or None, got rewards of shape "
            f"{list(of_rows.shape)} of {rows} completions: give a list of as many."
        )
    return of_rows.tolist()


def _is_async(judge: Any) -> bool:
    while isinstance(judge, functools.partial):
        judge = judge.func
    return inspect.iscoroutinefunction(judge) or inspect.iscoroutinefunction(judge.__call__)


def _check_columns(lengths: Sequence[dict[str, int]], rows: int) -> None:
    """Refuse, on all ranks, columns that cannot be cut by ranks once they are gathered."""
    for name in sorted(set().union(*lengths)):
        each = [of_rank.get(name, rows) for of_rank in lengths]
        if len(set(each)) > 1:
            raise ValueError(
                f"Every batch rank logs a value of each of its rows, got log_extra of {name!r} "
                f"with {each} values on batch ranks: give it one for each of {rows} rows."
            )
