"""kill -9 of a rank at any moment: what resumes equals what nothing happened to, bit for bit.

A run of two ranks saves every second step. One rank is killed at a random moment (of a fixed seed)
between its first step and its end; its peer ends by itself, as it does where a machine is gone. The
next start goes on from what is there, and its last checkpoint is compared with the uninterrupted
run's by the checksum of every shard: weights, optimizer, schedule and place in the data.
"""

import functools
import itertools
import os
import random
import signal
import tempfile
import time
from functools import partial
from pathlib import Path

import pytest

from dtcp.pretrain.manifest import FileRecord, read_manifest
from dtcp.pretrain.saved_folders import SavedFolders
from tests.harness import train_run
from tests.harness.patience import Patience
from tests.harness.run_script import forked_ranks
from tests.pretrain.test_train import micro

STEPS, RANKS = 8, 2
MOMENTS = {"eager": 20, "compiled": 5}
"""Of each rank. Compiled ones take twice as long; twenty of these passed once, too."""
COMPILED = ("--compile.enable", "--compile.backend", "aot_eager")

# Saves every second step, and no validation between them.
SETTINGS = (
    "--training.steps",
    f"{STEPS}",
    "--validator.no-enable",
    "--metrics.no-enable_tensorboard",
)

train = partial(train_run.train, module="tests.pretrain.test_train", config=micro.__name__)


def shards(folder: Path) -> dict[str, FileRecord]:
    """Size and checksum of every shard of the last step."""
    manifest = read_manifest(folder / f"checkpoint/step-{STEPS}")
    return {name: file for name, file in manifest.files.items() if name.endswith(".distcp")}


def options(mode: str) -> tuple[str, ...]:
    return (*SETTINGS, *(COMPILED if mode == "compiled" else ()))


@functools.cache
def uninterrupted(mode: str) -> tuple[dict[str, FileRecord], float]:
    """The shards of a run that nothing happens to, and the seconds from first step to last save."""
    with tempfile.TemporaryDirectory() as folder:
        seconds = run_and_kill(Path(folder), mode, rank=0, moment=None)
        return shards(Path(folder)), seconds


def run_and_kill(folder: Path, mode: str, *, rank: int, moment: float | None) -> float:
    """Start a run, and kill a rank so many seconds after the first step; None kills none.

    Returns:
        seconds from the first step to the last save, or to the end of the last rank.
    """
    named = ("--module", "tests.pretrain.test_train", "--config", micro.__name__)
    arguments = (*named, *train_run.PATIENT, *options(mode), "--dump_folder", str(folder))
    with tempfile.NamedTemporaryFile() as printed, tempfile.NamedTemporaryFile() as errors:
        files = (printed.name, errors.name)
        with forked_ranks("train.py", arguments, ranks=RANKS, files=files) as processes:
            patience = Patience(120)
            while b"\nstep " not in Path(printed.name).read_bytes() and patience.left():
                time.sleep(0.01)
            start = end = time.monotonic()
            if moment is not None:
                time.sleep(moment)
                if processes[rank].is_alive():
                    os.kill(processes[rank].pid, signal.SIGKILL)
            while any(process.is_alive() for process in processes) and patience.left():
                if f"checkpoint/step-{STEPS}\n" not in Path(printed.name).read_text():
                    end = time.monotonic()
                time.sleep(0.01)
            assert patience.left(), Path(errors.name).read_text()
            return end - start


def kills() -> list[object]:
    """Mode, rank and number of a moment."""
    modes = [itertools.product((mode,), range(RANKS), range(n)) for mode, n in MOMENTS.items()]
    return [
        pytest.param(*case, id="E3-{}-rank{}-{}".format(*case)) for case in itertools.chain(*modes)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "rank", "number"), kills())
def test_survive_kill_of_a_rank_at_any_moment(mode, rank, number, tmp_path):
    expected, seconds = uninterrupted(mode)
    moment = random.Random(f"{mode} {rank} {number}").random() * seconds
    run_and_kill(tmp_path, mode, rank=rank, moment=moment)
    reached = SavedFolders(tmp_path / "checkpoint").whole()
    assert reached == SavedFolders(tmp_path / "checkpoint").steps()
    code, output = train("--dump_folder", str(tmp_path), *options(mode), ranks=RANKS)
    assert code == 0, output
    assert not reached or f"step-{reached[-1]}" in output
    assert shards(tmp_path) == expected
