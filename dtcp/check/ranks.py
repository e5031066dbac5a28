"""Check a model on ranks of this machine: processes forked from this one, on its CPU."""

import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path

import torch
from torch import distributed as dist
from torch import multiprocessing

from dtcp._torch.compiler import dynamo_error
from dtcp.check.checked_model import CheckedModel, Mixing
from dtcp.check.memory import MemoryEstimate
from dtcp.check.parity import CheckOptions, ParityResult, compare, seeded
from dtcp.distributed.mesh import ParallelMesh
from dtcp.parallelize import Compile

REFUSALS = (ValueError, NotImplementedError)
"""Errors that mean that something cannot be done, not that something went wrong."""


_COMPILER = (
    *("torch._dynamo.backends.debugging", "torch._dynamo.backends.cudagraphs"),
    *("torch._dynamo.backends.distributed", "torch._dynamo.backends.inductor"),
    *("torch._inductor.compile_fx", "torch._export.db.logging", "torch.export._trace"),
    "torch.fx.experimental.validator",
)


_NOTHING_TO_COMPARE = (
    "A check compares layers that mix tokens, got a model with none: add one (num_hidden_layers of "
    "a config)."
)


class RankFailed(RuntimeError):
    """A rank raised what is no refusal: the error, and a rank's traceback."""

    def __init__(self, error: str, traceback: str) -> None:
        super().__init__(f"{error}\n{traceback}")
        self.error = error


@dataclass(frozen=True)
class CheckReport:
    """The result of a check; runs is empty if something was refused."""

    mixing: Mixing
    bound: float
    runs: Mapping[str, ParityResult] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return bool(self.runs) and not any(self.failures(name) for name in self.runs)

    @property
    def claims(self) -> Mapping[str, str]:
        """Which style claimed which mixer on the ranks; what would have, where they did not run."""
        on_ranks = next((run.claims for run in self.runs.values()), {})
        return on_ranks or self.mixing.claims

    def failures(self, run: str) -> dict[str, float]:
        """Errors out of bound, NaN included."""
        errors = self.runs[run].errors
        return {name: error for name, error in errors.items() if not error <= self.bound}


def check_model(
    checked: CheckedModel, options: CheckOptions, say: Callable[[str], None] = print
) -> CheckReport:
    """Check a model; ranks are processes on this machine's CPU.

    What a rank refuses is in the report.

    Args:
        say: called with how much memory the check will take, before it takes it.
    Raises:
        ValueError: the model cannot be built or run on one device, or memory does not suffice.
        RankFailed: a rank raised anything but a refusal.
    """
    world = options.degrees.world
    memory = MemoryEstimate.of(checked.parameter_count(), world, compiles=bool(options.backend))
    say(f"{memory}")
    memory.check()
    mixing = checked.mixing(seeded(checked), options.style, options.degrees.tp)
    if not mixing.refused and not mixing.claims:
        mixing = replace(mixing, refused=(_NOTHING_TO_COMPARE,))
    if mixing.refused:
        return CheckReport(mixing, options.bound)
    if options.backend:
        import_compiler()
    with tempfile.TemporaryDirectory(prefix="dtcp-check-") as folder:
        try:
            multiprocessing.start_processes(
                _rank, (checked, options, folder), nprocs=world, start_method="fork"
            )
        except multiprocessing.ProcessRaisedException as error:
            refusals = {path.read_text() for path in Path(folder).glob("refused-*")}
            if not refusals:
                raise RankFailed(_first(Path(folder).glob("raised-*")), f"{error}") from error
            return CheckReport(replace(mixing, refused=tuple(sorted(refusals))), options.bound)
        # Written by rank 0 a moment ago.
        runs = torch.load(Path(folder, "runs"), weights_only=False)
    return CheckReport(mixing, options.bound, runs)


def import_compiler() -> None:
    """Import what a first compilation imports, once instead of on every rank."""
    for name in _COMPILER:
        import_module(name)


def _rank(rank: int, checked: CheckedModel, options: CheckOptions, folder: str) -> None:
    torch.set_num_threads(1)
    world = options.degrees.world
    store = dist.FileStore(os.path.join(folder, "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    try:
        mesh = ParallelMesh.from_degrees(options.degrees, "cpu")
        runs = {"eager": compare(checked, options, mesh, None)}
        if options.backend:
            with _no_graph(runs["eager"], options):
                runs[options.backend] = compare(checked, options, mesh, Compile(options.backend))
        if rank == 0:
            torch.save(runs, Path(folder, "runs"))
    except REFUSALS as error:
        Path(folder, f"refused-{rank}").write_text(str(error))
        raise
    # Written down and raised again, whatever the model's code raised: the other ranks will say only
    # that this one is gone, and the parent may hear of them first.
    except Exception as error:
        Path(folder, f"raised-{rank}").write_text(f"{type(error).__name__}: {error}")
        raise
    finally:
        dist.destroy_process_group()


@contextmanager
def _no_graph(eager: ParityResult, options: CheckOptions) -> Iterator[None]:
    """Explain a block without a whole graph, and that the model may still run eager."""
    try:
        yield
    except dynamo_error() as error:
        cause = re.search(r"Caused by: (.*?) \(", f"{error}")
        said = cause[1] if cause else f"{error}".strip().splitlines()[0]
        worst = max(eager.errors.values())
        right = "right" if worst <= options.bound else "wrong"
        raise ValueError(
            f"Compile makes one graph of each block, got one without ({type(error).__name__}: "
            f"{said}): leave compile out, here by --compile ''; eager the model is {right}, with "
            f"a largest error of {worst:.0e}."
        ) from error


def _first(paths: Iterable[Path]) -> str:
    """The text of the oldest of these files."""
    return min(paths, key=lambda path: path.stat().st_mtime_ns).read_text()
