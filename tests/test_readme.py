"""What the README says runs, runs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

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
    # A file for each rank: in one pipe the lines of two ranks may run into each other.
    files = ["--redirects", "3", "--log-dir", str(tmp_path / "ranks")]
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node", ranks, *files]
    ran = subprocess.run(
        [sys.executable, "-m", *command, str(script)],
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    errors = [path.read_text() for path in sorted(tmp_path.rglob("stderr.log"))]
    assert ran.returncode == 0, "\n".join((ran.stderr, *errors))
    printed = [path.read_text() for path in tmp_path.rglob("stdout.log")]
    assert [len(re.findall(PRINTED[index], out)) for out in printed] == [1] * int(ranks)


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
