"""Options that people give a Trainer are carried out on a mesh as in one process."""

import re

import pytest

from tests.harness.run_script import run_forked

CASES = {
    "rows": ("many", "uneven", "uneven_doubled", "uneven_by_function", "flattened", "compiled"),
    "ends": ("uneven_stream", "uneven_flattened", "masked", "decided", "tuned"),
    "preferences": (
        "preferences",
        "many_preferences",
        "adapted_preferences",
        "shared_preferences",
        "unpaired",
        "cached_unpaired",
    ),
    "two sequences": ("two_sequences", "bart", "adapted_two_sequences"),
}
"""Those of a group share their processes, each of which imports TRL for seconds."""


@pytest.mark.slow
@pytest.mark.parametrize("group", CASES)
def test_trainer_with_options_logs_what_one_process_does(tmp_path, group):
    logs = tmp_path / "alone.json"
    for ranks in (0, 2):
        ended = run_forked("tests/trainers/options.py", str(logs), *CASES[group], ranks=ranks)
        assert ended.code == 0, ended.errors[-3000:]
    compared = re.findall(r"^(\w+): losses .* from one process$", ended.printed, re.M)
    assert compared == list(CASES[group]), ended.printed
