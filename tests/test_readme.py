"""What the README says runs, runs."""

import re
from pathlib import Path

import pytest

from tests.harness.run_script import run_forked

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


EXAMPLES = re.findall(r"`torchrun --nproc-per-node (\d)`.*?```python\n(.*?)```", README, re.DOTALL)
PRINTED = (
    r"\(1, 512, 64\) of \(1, 1024, 64\)",
    r"this rank's share of the loss: (\d\.\d{3})",
)


def test_every_example_says_how_it_is_run():
    assert len(EXAMPLES) == README.count("```python") == len(PRINTED)


def test_the_transformers_example_has_twelve_lines():
    _, example = EXAMPLES[1]
    assert len(example.splitlines()) == 12


@pytest.mark.parametrize("index", range(len(PRINTED)))
def test_the_example_runs_as_printed(tmp_path, index):
    ranks, example = EXAMPLES[index]
    script = tmp_path / "example.py"
    script.write_text(example)
    ended = run_forked(script, ranks=int(ranks))
    assert ended.code == 0, ended.errors
    assert len(re.findall(PRINTED[index], ended.printed)) == int(ranks)


def test_its_commands_name_configs_and_files_that_exist():
    registry = (ROOT / "dtcp/pretrain/configs.py").read_text()
    named = re.findall(r"--config (\w+)", README)
    assert named
    assert [name for name in named if f"def {name}()" not in registry] == []
    paths = re.findall(r"`((?:dtcp|parallelize|models|docs|benchmarks)/[\w/]+\.\w+)`", README)
    assert paths
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_ci_runs_the_readme_test_command():
    commands = re.findall(r"^(make \w+) ", README, re.MULTILINE)
    assert "make test" in commands
    assert "make test" in (ROOT / ".ci/run").read_text()
