"""Rows E6, E8: runs of train.py that are stopped, run out of data, and go on."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dtcp.torchtitan import compat as compat

import pytest
from torch import distributed as dist

from dtcp.pretrain import attempt
from dtcp.pretrain.data import PackedDocuments
from dtcp.pretrain.progress import Progress
from dtcp.pretrain.trainer import Trainer
from tests.harness import train_run
from tests.harness.held import Held, hold, release
from tests.harness.patience import Patience
from tests.harness.started import Started, forked_script
from tests.harness.train_run import losses
from tests.pretrain.test_survive_processes import runs
from tests.pretrain.test_train import micro

LAST = 6
"""The step after which the data of `finite` are at their end."""


class InterruptedProgress(Progress):
    """In step 2, rank 1 alone is sent SIGTERM."""

    @dataclass(kw_only=True, slots=True)
    class Config(Progress.Config):
        pass

    def log(self, step: int, *args: Any, **kwargs: Any) -> None:
        super().log(step, *args, **kwargs)
        if step == 2 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def finite() -> Trainer.Config:
    """Data for six steps, and settings for a hundred; nothing is saved on the way."""
    config = micro()
    config.training.steps = config.checkpoint.interval = 100
    config.validator.enable = False
    config.dataloader = PackedDocuments.Config(dataset="folder", part="all", infinite=False)
    return config


def interrupted() -> Trainer.Config:
    config = finite()
    config.metrics = InterruptedProgress.Config(
        log_freq=1, enable_tensorboard=True, disable_color_printing=True
    )
    return config


def endless() -> Trainer.Config:
    """A run that ends when it is stopped, however late that is."""
    config = micro()
    config.training.steps = config.checkpoint.interval = 1_000_000
    config.validator.enable = False
    return config


def held() -> Trainer.Config:
    """A save in each step, to be interrupted behind one."""
    # Ranks that lost a peer are killed by their launcher before they say so, however slow it is.
    attempt.BEAT = 3600.0
    config = finite()
    config.checkpoint.interval = 1
    config.metrics = Held.Config(log_freq=1, enable_tensorboard=True)
    return config


class Measured(Progress):
    """Every rank says every ten steps what it holds of its machine."""

    @dataclass(kw_only=True, slots=True)
    class Config(Progress.Config):
        pass

    def log(self, step: int, *args: Any, **kwargs: Any) -> None:
        super().log(step, *args, **kwargs)
        if step % 10 == 0:
            resident = int(Path("/proc/self/statm").read_text().split()[1])
            held = {
                "rank": dist.get_rank(),
                "step": step,
                "resident": resident,
                "descriptors": len(os.listdir("/proc/self/fd")),
                "threads": len(os.listdir("/proc/self/task")),
            }
            print("measured", json.dumps(held), flush=True)


def measured() -> Trainer.Config:
    config = micro()
    config.training.steps = 300
    config.checkpoint.interval = config.validator.freq = 10
    config.metrics = Measured.Config(log_freq=1, enable_tensorboard=True)
    return config


NAMED = {"module": "tests.pretrain.test_survive_runs"}
train, trained = partial(train_run.train, **NAMED), partial(train_run.trained, **NAMED)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows for six steps of four rows of 64 tokens, and half a step more."""
    folder = tmp_path_factory.mktemp("data")
    size = 64 * 4 * LAST + 128
    for i, name in enumerate("abcd"):
        text = "".join(chr(97 + (i + j * j) % 26) for j in range(size // 4))
        (folder / f"{name}.txt").write_text(text)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, data: Path) -> tuple[Path, str]:
    """A run to the end of its data."""
    folder = tmp_path_factory.mktemp("whole")
    output = trained(*folders(folder, data), "--checkpoint.export_hf", config="finite")
    return folder, output


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, data: Path) -> tuple[Path, int, str]:
    """A run that is interrupted in step 2."""
    folder = tmp_path_factory.mktemp("stopped")
    return folder, *train(*folders(folder, data), config="interrupted")


def folders(run: Path, data: Path) -> tuple[str, ...]:
    return ("--dump_folder", str(run), "--dataloader.dataset_path", str(data))


def started(
    *options: str, config: str, forked: bool = True
) -> contextlib.AbstractContextManager[Started]:
    """train.py as a person starts it, without an import's time where it is forked."""
    named = ("--module", "tests.pretrain.test_survive_runs", "--config", config)
    arguments = (*named, *train_run.PATIENT, *options)
    return forked_script("train.py", *arguments) if forked else in_a_terminal(*arguments)


@contextlib.contextmanager
def in_a_terminal(*arguments: str) -> Iterator[Started]:
    """train.py in a group of processes of its own."""
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [sys.executable, "train.py", *arguments],
            cwd=train_run.ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # Who starts the tests in the background has it ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        try:
            yield Started(process, output)
        finally:
            process.kill()
            process.wait()


def ranks_of(launcher: int) -> list[int]:
    """Process ids of the ranks that a launcher has forked, the first one first."""
    # In the order of their birth: numbers begin anew where they are used up.
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text()
    return [int(child) for child in children.split()]


@pytest.mark.slow
def test_survive_E8_data_that_end_are_a_last_step_with_save_and_export(whole):
    folder, output = whole
    assert list(losses(output)) == [1, 2, 3, 4, 5, 6]
    assert f"end of data after step {LAST}" in output
    assert (folder / f"checkpoint/step-{LAST}").is_dir()
    assert (folder / "hf/model.safetensors.index.json").is_file()


def test_survive_E8_a_signal_to_one_rank_stops_all_after_the_same_step(stopped):
    folder, code, output = stopped
    assert code == 128 + signal.SIGTERM, output
    assert list(losses(output)) == [1, 2, 3]
    assert "stopped     by SIGTERM after step 3; start again to go on" in output
    assert [path.name for path in folder.glob("checkpoint/*")] == ["step-3"]
    assert "error" not in output and "Traceback" not in output


def test_survive_E8_a_stopped_run_goes_on_as_if_nothing_had_been(whole, stopped, data, tmp_path):
    folder = shutil.copytree(stopped[0], tmp_path / "run")
    output = trained(*folders(folder, data), config="finite")
    after = losses(whole[1])
    assert losses(output) == {step: after[step] for step in (4, 5, 6)}


@pytest.mark.slow
def test_survive_E6_a_run_does_not_go_on_in_other_data(stopped, data, tmp_path):
    folder = shutil.copytree(stopped[0], tmp_path / "run")
    other = shutil.copytree(data, tmp_path / "data")
    (other / "e.txt").write_text("one file more")
    code, output = train(*folders(folder, other), config="finite")
    assert code == 1
    assert output.count("error:") == 1 and "got other data (added: e.txt)" in output
    assert "Traceback" not in output and not losses(output)


@pytest.mark.slow
def test_survive_E13_an_error_of_the_data_names_step_and_document(data, tmp_path):
    """In the third step, on all ranks alike."""
    lines = [json.dumps({"text": f"{i}" * 510}) for i in range(5)]
    (tmp_path / "x.jsonl").write_text("\n".join([*lines, '{"text": 5}']))
    code, output = train(*folders(tmp_path / "run", tmp_path), config="finite")
    assert code == 1 and output.count("error:") == 1 and "Traceback" not in output
    assert "x.jsonl:6 with text='5' of type int" in output
    assert "epoch 0) (read on all ranks for step" in output


# As a person starts it.


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_survive_E8_a_launcher_that_is_stopped_saves_and_says_so(number, tmp_path):
    """SIGTERM to the launcher; Ctrl-C to the whole group of the terminal."""
    is_real = number == signal.SIGINT
    with started("--dump_folder", str(tmp_path), config="endless", forked=not is_real) as run:
        run.wait_for("step     3/")
        if is_real:
            os.killpg(run.process.pid, number)
        else:
            run.process.send_signal(number)
        code = run.wait()
        output = run.said()
    assert code == 128 + number, output
    last = max(losses(output))
    assert [path.name for path in tmp_path.glob("checkpoint/step-*")] == [f"step-{last}"]
    assert output.splitlines()[-1] == f"stopped by {number.name}; ranks are ended"
    assert "Traceback" not in output and "error" not in output


@pytest.mark.slow
def test_survive_E10_train_py_restarts_killed_ranks_by_itself(whole, data, tmp_path):
    """Once and once more, with the losses of a run that nothing happened to."""
    for step in (2, 3):
        hold(tmp_path, step, 0, 1)
    restarts = ("--dtcp.max_restarts", "2")
    with started(*folders(tmp_path, data), *restarts, config="held") as run:
        for step in (2, 3):
            run.wait_for(f"step     {step}/")
            os.kill(ranks_of(run.process.pid)[step % 2], signal.SIGKILL)
            release(tmp_path, step)
        code, output = run.wait(), run.said()
    assert code == 0, output
    assert output.count("was killed by SIGKILL") == output.count("restart     ") == 2
    assert losses(output) == losses(whole[1])


@pytest.mark.slow
def test_survive_E7_two_runs_do_not_share_a_folder(data, tmp_path):
    """The second is refused before its ranks start, and the first is not disturbed. A third goes
    on where the first was killed, and says whose folder it took over."""
    hold(tmp_path, 2, 0, 1)
    with started(*folders(tmp_path, data), config="held") as run:
        run.wait_for("step     2/")
        with started(*folders(tmp_path, data), config="finite") as second:
            assert second.wait() == 1
            assert "A folder has one run at a time" in second.said()
            assert f"--dump_folder {tmp_path}, which process" in second.said()
            assert "Traceback" not in second.said() and "model" not in second.said()
        ranks = ranks_of(run.process.pid)
        run.process.kill()
        run.process.wait()
    patience = Patience(20)
    while any(map(runs, ranks)) and patience.left():
        time.sleep(0.05)
    with started(*folders(tmp_path, data), config="finite") as third:
        assert third.wait() == 0, third.said()
        assert f"took over   {tmp_path} from process {ranks[0]}" in third.said()
        assert list(losses(third.said())) == list(range(2, LAST + 1))


@pytest.mark.slow
def test_survive_300_steps_leave_memory_descriptors_and_threads_as_they_are(tmp_path):
    """With a save and a validation every ten steps."""
    options = ("--training.steps", "300", "--dump_folder", str(tmp_path))
    output = trained(*options, config="measured", seconds=1200)
    measured = [json.loads(line) for line in re.findall(r"^measured (.*)$", output, re.MULTILINE)]
    for rank in range(2):
        early, late = (
            [m for m in measured if m["rank"] == rank and m["step"] in steps]
            for steps in (range(100, 200), range(200, 301))
        )
        assert len(early) >= 9 and len(late) >= 9
        # The least of each: a thread that watches the folder opens a file now and then, and a
        # leak would raise every count after it.
        for name in ("descriptors", "threads"):
            assert min(m[name] for m in late) <= min(m[name] for m in early), name
        grown = max(m["resident"] for m in late) / max(m["resident"] for m in early)
        assert grown < 1.02
