"""The README is short, and what it says runs, runs as printed (test_code_blocks.py)."""

import re

import pytest

from dtcp.distributed.mesh import Degrees
from dtcp.planner.forecast import forecast
from dtcp.planner.setup import Setup
from dtcp.planner.subject import subject_of_hf
from dtcp.sequence.documents import Documents
from tests.docs.blocks import BLOCKS, PYTHON, ROOT

README = (ROOT / "README.md").read_text()
EXAMPLES = [block for block in PYTHON if block.page == "README.md"]


def test_it_is_short():
    assert len(README.splitlines()) <= 150


def test_its_examples_are_those_of_the_start_page_which_are_run():
    start = [block.text for block in BLOCKS if block.page == "docs/index.md" and block.ranks]
    assert [example.text for example in EXAMPLES] == start
    assert len(EXAMPLES) == README.count("```python") == 2


def test_every_example_says_how_it_is_run():
    said = re.findall(r"`torchrun --nproc-per-node (\d)`", README)
    assert [int(ranks) for ranks in said] == [example.ranks for example in EXAMPLES]


def test_its_examples_have_twenty_lines_and_twelve():
    own, transformers = ([x for x in e.text.splitlines() if x] for e in EXAMPLES)
    assert len(own) <= 20 and len(transformers) == 12


def test_ci_runs_the_test_command_it_names():
    commands = re.findall(r"^(make [\w-]+) ", README, re.MULTILINE)
    assert {"make train", "make test"} <= set(commands) and "make test-all" in README
    assert "make test" in (ROOT / ".ci/run").read_text()


@pytest.mark.slow
def test_the_bytes_it_names_are_those_of_the_planner():
    """Of one document of 128K tokens on 8 ranks of cp, head-tail: the defaults of a setup."""
    setup = Setup(Degrees(cp=8), Documents.single(batch=1, seq_len=2**17))
    said = re.search(r"Gemma 4\s+receives ([\d.]+) GB [^,]*, DeepSeek-V4-Flash ([\d.]+)", README)
    for model, figure in zip(("gemma4-31b", "deepseek-v4-flash"), said.groups(), strict=True):
        assert f"{forecast(subject_of_hf(model), setup).cp.forward / 1e9:.2f}" == figure
