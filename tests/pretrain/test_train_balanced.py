"""train.py where documents are dealt out by DocumentBalanced: every family loses as one device."""

import re

import pytest

from tests.harness.train_run import losses, trained

FAMILIES = ("qwen3_5_tiny", "gemma4_tiny", "deepseek_v4_tiny")
"""Llama does so in test_train.py, compiled."""
SHORT = ("--training.seq_len", "512")


@pytest.mark.slow
@pytest.mark.parametrize("config", FAMILIES)
def test_family_on_balanced_documents_verifies_against_one_device(config, tmp_path):
    """The tiny configs with shorter rows, without the compiler: cp 2 x tp 2."""
    output = trained(
        *("--training.steps", "2", "--compile.no-enable", "--validator.no-enable", *SHORT),
        *("--dtcp.layout", "document_balanced", "--dtcp.verify", "2"),
        *("--dump_folder", str(tmp_path)),
        config=config,
        ranks=4,
    )
    assert "the losses of 2 steps agree" in output


@pytest.mark.slow
def test_rows_of_equal_work_verify_against_one_device(tmp_path):
    """Two rows on each of two data-parallel ranks, dealt out eight at a time."""
    output = trained(
        *("--training.steps", "3", "--compile.no-enable", "--validator.no-enable", *SHORT),
        *("--parallelism.tensor_parallel_degree", "1", "--training.local_batch_size", "2"),
        *("--dtcp.layout", "document_balanced", "--dataloader.balance_rows", "8"),
        *("--dtcp.verify", "3", "--dump_folder", str(tmp_path)),
        config="llama_tiny",
        ranks=4,
    )
    assert "the losses of 3 steps agree" in output
    (work, *_) = re.findall(r"rows (\d\.\d\d) of mean", output)
    assert 1 <= float(work) < 1.3


@pytest.mark.slow
def test_rows_of_equal_work_balanced_over_dp_go_on_after_a_restart(tmp_path):
    """Stopped inside a window of three steps; every step says how even its ranks' rows are."""

    def run(folder: str, steps: int) -> str:
        output = trained(
            *("--training.steps", str(steps), "--lr_scheduler.total_steps", "4"),
            *("--compile.no-enable", "--validator.no-enable", *SHORT),
            *("--training.local_batch_size", "2"),
            *("--parallelism.context_parallel_degree", "1", "--dataloader.balance_rows", "12"),
            *("--parallelism.tensor_parallel_degree", "1"),
            *("--dump_folder", str(tmp_path / folder)),
            config="llama_tiny",
            ranks=2,
        )
        return output

    whole, first, rest = run("whole", 4), run("stopped", 2), run("stopped", 4)
    assert losses(first) | losses(rest) == losses(whole) and list(losses(rest)) == [3, 4]
    uneven = [
        [float(x) for x in re.findall(r"rows (\d\.\d\d) of mean", output)]
        for output in (whole, first, rest)
    ]
    assert uneven[1] + uneven[2] == uneven[0] and len(uneven[0]) == 4
    assert all(1 <= x < 1.5 for x in uneven[0])
