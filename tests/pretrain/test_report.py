"""What is left of a run: a plot of its loss, one line for its failure."""

import errno
import io
import os
import shutil
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.distributed import DistNetworkError
from torch.utils.tensorboard import SummaryWriter

from dtcp.pretrain import run
from dtcp.pretrain.folder_lock import FolderLock
from dtcp.pretrain.options import parse
from dtcp.pretrain.plot import TRAINING, plot_losses, read_losses
from dtcp.pretrain.progress import Progress
from dtcp.pretrain.report import say_failure
from tests.harness.spmd import spmd


def test_a_plot_shows_a_step_as_it_was_last(tmp_path):
    for start, values in enumerate(([3.0, 2.0, 9.0], [1.5, 1.0])):
        with SummaryWriter(str(tmp_path / f"tb/{start}")) as log:
            for step, value in enumerate(values, start=1 if start == 0 else 3):
                log.add_scalar(TRAINING, value, step)
    assert read_losses(tmp_path, TRAINING) == {1: 3.0, 2: 2.0, 3: 1.5, 4: 1.0}
    assert plot_losses(tmp_path).stat().st_size > 1000


def test_a_plot_shows_the_way_that_a_run_went(tmp_path):
    """Back to step 2, logged every third step: what came after it the first time is not its."""
    for second, steps in enumerate(([1, 3, 6, 9], [3, 6])):
        with SummaryWriter(str(tmp_path / "new")) as log:
            for step in steps:
                log.add_scalar(TRAINING, 10.0 * second + step, step)
        (written,) = (tmp_path / "new").iterdir()
        path = written.rename(tmp_path / f"events.out.tfevents.179597138{second}.host.1.0")
        os.utime(path, (9 - second, 9 - second))  # as a copy may have them
    other = tmp_path / "another_run"
    with SummaryWriter(f"{other}/tb") as log:
        log.add_scalar(TRAINING, 99.0, 2)
    FolderLock(other).release()
    assert read_losses(tmp_path, TRAINING) == {1: 1.0, 3: 13.0, 6: 16.0}
    assert read_losses(other, TRAINING) == {2: 99.0}


def test_a_plot_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="got none in folder"):
        plot_losses(tmp_path)


def test_metrics_that_cannot_be_written_end_a_run_in_a_sentence():
    def log(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    progress = Progress.__new__(Progress)
    progress.logger = SimpleNamespace(log=log)
    with pytest.raises(ValueError, match=r"got No space left on device at step=3: make room"):
        progress._send({"loss": 1.0}, 3)


@spmd(ranks=1)
def test_metrics_are_in_the_file_as_soon_as_they_are_logged(mesh):
    """Without an end of the run: a killed one has its last lines, too."""
    folder = Path(tempfile.mkdtemp())
    progress = Progress.__new__(Progress)
    dims = SimpleNamespace(pp_enabled=False)
    config = Progress.Config(enable_tensorboard=True)
    progress.logger = progress._build_metric_logger(
        config=config, parallel_dims=dims, dump_folder=str(folder), pp_schedule=""
    )
    for step in (1, 2):
        progress._send({TRAINING: 1.0 / step}, step)
        assert read_losses(folder, TRAINING) == {s: 1.0 / s for s in range(1, step + 1)}
    progress.close()
    shutil.rmtree(folder)


def test_a_failure_is_one_line_and_a_file(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    say_failure(ValueError("x is y, got x=1: set it to 2."), tmp_path)
    assert capsys.readouterr().err.startswith("error: x is y, got x=1: set it to 2. (traceback")
    assert "ValueError" in (tmp_path / "errors/rank_0.txt").read_text()
    monkeypatch.setenv("RANK", "1")
    say_failure(ValueError("x is y, got x=1: set it to 2."), tmp_path)
    assert not capsys.readouterr().err


def test_a_rank_that_meets_nobody_says_where_it_looked(tmp_path: Path, capsys, monkeypatch):
    """Of ranks that no agent started, each for itself."""
    for name, value in {"RANK": "1", "MASTER_ADDR": "host", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    say_failure(DistNetworkError("Ping failed, invalid value"), tmp_path)
    said = capsys.readouterr().err
    assert said.startswith("error: All ranks meet in a store of rank 0, got rank 1 alone at ")
    assert "=host:29500 (Ping failed, invalid value): look at" in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("number", "path"),
    [
        (errno.ENOSPC, "traces/rank0.json.gz"),
        (errno.ENOSPC, "/tmp/torchinductor/fxgraph"),
        (errno.EROFS, "traces/rank0.json.gz"),
    ],
)
def test_a_disk_that_takes_nothing_is_one_line_whoever_writes(
    tmp_path: Path, capsys, monkeypatch, number, path
):
    """Of its folder or another; without a traceback that nobody can find: that takes no file."""
    monkeypatch.setattr(Path, "write_text", lambda *_, **__: os.open("/dev/null/x", 0))
    say_failure(OSError(number, os.strerror(number), path), tmp_path)
    assert capsys.readouterr().err == (
        f"error: A run's disks take what it writes, got {os.strerror(number)} at {path}: make room "
        f"there or write elsewhere, and start again to go on from the last checkpoint.\n"
    )


def test_a_log_that_cannot_be_closed_hides_no_error():
    def close():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    progress = Progress.__new__(Progress)
    progress.logger = SimpleNamespace(close=close)
    progress.close()


def test_a_folder_that_is_closed_is_one_line(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    say_failure(PermissionError(errno.EACCES, "Permission denied", "/closed/data"), tmp_path)
    said = capsys.readouterr().err
    assert said.startswith("error: [Errno 13] Permission denied: '/closed/data' (traceback: ")


def test_a_failure_may_name_a_path_that_is_no_text(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    said = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace")  # Python's
    monkeypatch.setattr(sys, "stderr", said)
    name = os.fsdecode(b"caf\xe9")
    say_failure(ValueError(f"x is y, got {name}: rename it."), tmp_path)
    assert said.buffer.getvalue().startswith(rb"error: x is y, got caf\udce9: rename it.")
    assert r"caf\udce9" in (tmp_path / "errors/rank_0.txt").read_text()


def test_a_run_that_ends_in_an_error_leaves_no_folder_to_take_over(tmp_path, monkeypatch):
    def fail(*_):
        raise ValueError("stop here")

    monkeypatch.setattr(run, "_start", fail)
    monkeypatch.setattr(run, "quiet", lambda rank: None)
    with pytest.raises(SystemExit):
        run.run_rank(parse(["--config=llama_tiny", "--dump_folder", f"{tmp_path}"]))
    lock = FolderLock(tmp_path)
    assert lock.taken_over is None
    lock.release()
