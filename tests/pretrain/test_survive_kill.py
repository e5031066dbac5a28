"""kill -9 of a rank at any moment: what resumes equals what nothing happened to, bit for bit.

A run of two ranks saves every second step. One rank is killed at a random moment (of a fixed seed)
of every two steps and their save, in each fifth of that time once: before, while and after they are
saved. Its peer ends by itself, as it does where a machine is gone. The next start goes on from what
is there and is killed in the two steps after those, and so on. The last start comes to its end, and
its last checkpoint is compared with the uninterrupted run's by the checksum of every shard: of
weights, optimizer, schedule and place in the data.
"""

import functools
import itertools
import os
import random
import re
import signal
import tempfile
import time
from functools import partial
from pathlib import Path

from dtcp.torchtitan import compat as compat

import pytest

from dtcp.pretrain import attempt
from dtcp.pretrain.manifest import FileRecord, read_manifest
from dtcp.pretrain.saved_folders import SavedFolders
from dtcp.pretrain.trainer import Trainer
from tests.harness import train_run
from tests.harness.held import Held, hold, release
from tests.harness.patience import Patience, slowness
from tests.harness.run_script import forked_ranks
from tests.pretrain.test_train import micro

STEPS, RANKS = 10, 2
EVERY = 2
"""Steps from save to save, in each of which a rank is killed once."""
VICTIMS = {"eager": [(0,), (0,), (1,), (1,)], "compiled": [(0, 1)]}
"""Of each run, the ranks that are killed in turn, five times in all. Each start compiles anew."""
COMPILED = ("--compile.enable", "--compile.backend", "aot_eager")

# Saves every second step, and no validation between them.
SETTINGS = (
    "--training.steps",
    f"{STEPS}",
    "--validator.no-enable",
    "--metrics.no-enable_tensorboard",
)


def quick() -> Trainer.Config:
    """Of a rank, which looks for signs of life six times as often on a quiet machine."""
    attempt.BEAT = 0.3 * slowness()
    config = micro()
    config.metrics = Held.Config(log_freq=1, enable_tensorboard=True)
    return config


NAMED = {"module": "tests.pretrain.test_survive_kill", "config": quick.__name__}

trained = partial(train_run.trained, **NAMED)


def shards(folder: Path) -> dict[str, FileRecord]:
    """Size and checksum of every shard of the last step."""
    manifest = read_manifest(folder / f"checkpoint/step-{STEPS}")
    return {name: file for name, file in manifest.files.items() if name.endswith(".distcp")}


def options(mode: str) -> tuple[str, ...]:
    return (*SETTINGS, *(COMPILED if mode == "compiled" else ()))


@functools.cache
def uninterrupted(mode: str) -> tuple[dict[str, FileRecord], float]:
    """The shards of a run that nothing happens to, and its seconds from save to save."""
    with tempfile.TemporaryDirectory() as folder:
        seconds, _ = run_and_kill(Path(folder), mode, rank=0, step=1, moment=None)
        return shards(Path(folder)), seconds * EVERY / STEPS


def run_and_kill(
    folder: Path, mode: str, *, rank: int, step: int, moment: float | None
) -> tuple[float, str]:
    """Start a run, and kill a rank so many seconds after a step; None kills none.

    A run may be faster than the one that was timed, so the rank waits to be killed behind the step
    after the next save, and is when that is printed.

    Returns:
        seconds from the step to the last save, or to the end of the last rank; what was printed.
    """
    if moment is not None:
        hold(folder, step + EVERY, rank)
    named = [word for name, value in NAMED.items() for word in (f"--{name}", value)]
    arguments = (*named, *train_run.PATIENT, *options(mode), "--dump_folder", str(folder))
    with tempfile.NamedTemporaryFile() as printed, tempfile.NamedTemporaryFile() as errors:
        files = (printed.name, errors.name)

        def said() -> str:
            return Path(printed.name).read_text()

        with forked_ranks("train.py", arguments, ranks=RANKS, files=files) as processes:
            patience = Patience(120)
            while patience.left():
                lives = any(process.is_alive() for process in processes)
                if has_reached(said(), step):
                    break
                assert lives, said()
                time.sleep(0.01)
            start = end = time.monotonic()
            if moment is not None:
                while time.monotonic() < start + moment and not has_reached(said(), step + EVERY):
                    time.sleep(0.002)
                if processes[rank].is_alive():
                    os.kill(processes[rank].pid, signal.SIGKILL)
                else:
                    assert step + EVERY > STEPS, said()
                release(folder, step + EVERY)
            while any(process.is_alive() for process in processes) and patience.left():
                if f"checkpoint/step-{STEPS}\n" not in said():
                    end = time.monotonic()
                time.sleep(0.01)
            assert patience.left(), Path(errors.name).read_text()
            return end - start, said()


def has_reached(said: str, step: int) -> bool:
    """Whether this step or a later one was printed: several may be between two looks."""
    return any(int(s) >= step for s in re.findall(rf"^step +(\d+)/{STEPS} ", said, re.M))


def runs() -> list[object]:
    """Mode, victims and number of a run."""
    return [
        pytest.param(mode, victims, number, id=f"E3-{mode}-{number}")
        for mode, runs_of_mode in VICTIMS.items()
        for number, victims in enumerate(runs_of_mode)
    ]


def moments_of(seed: str, number: int) -> list[float]:
    """Numbers from 0 to 1, in each part of equal length one."""
    generator = random.Random(seed)
    parts = generator.sample(range(number), number)
    return [(part + generator.random()) / number for part in parts]


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "victims", "number"), runs())
def test_survive_kill_of_a_rank_at_any_moment(mode, victims, number, tmp_path):
    expected, seconds = uninterrupted(mode)
    moments = moments_of(f"{mode} {number}", STEPS // EVERY)
    folders, reached = SavedFolders(tmp_path / "checkpoint"), []
    ranks = itertools.cycle(victims)
    for step, moment, rank in zip(range(1, STEPS, EVERY), moments, ranks, strict=False):
        _, said = run_and_kill(tmp_path, mode, rank=rank, step=step, moment=moment * seconds)
        assert not reached or f"step-{reached[-1]}" in said
        reached = folders.whole()
        assert reached == folders.steps() and set(reached) <= set(range(EVERY, step + EVERY, EVERY))
    output = trained("--dump_folder", str(tmp_path), *options(mode), ranks=RANKS)
    assert not reached or f"step-{reached[-1]}" in output
    assert shards(tmp_path) == expected
