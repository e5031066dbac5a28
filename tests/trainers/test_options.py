"""Options that people give a Trainer are carried out on a mesh as in one process."""

import pytest

from tests.harness.run_script import run_forked

CASES = [
    *("many", "uneven", "flattened", "compiled", "preferences", "adapted_preferences", "unpaired"),
    *("cached_unpaired", "two_sequences", "bart", "adapted_two_sequences"),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_trainer_with_options_logs_what_one_process_does(tmp_path, case):
    logs = tmp_path / "alone.json"
    for ranks in (0, 2):
        ended = run_forked("tests/trainers/options.py", str(logs), case, ranks=ranks)
        assert ended.code == 0, ended.errors[-3000:]
    assert f"{case}: " in ended.printed and "from one process" in ended.printed
