"""What README and docs print, runs.

A block without a title runs in this process, after the blocks before it on its page. Those `on N
ranks` are, together, a script that torchrun starts on N. One with another title is a part of that
file, which the others may import.
"""

import contextlib
import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import distributed as dist

from dtcp.check import CheckedMixerModel, CheckOptions, CheckReport, compare
from dtcp.check.__main__ import lines, main
from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.parallelize import Compile
from dtcp.sequence.layout import Contiguous, HeadTail
from tests.docs.blocks import BLOCKS, PYTHON, ROOT, commands_of, files_of, pages_with
from tests.harness.run_script import run_forked, run_python
from tests.harness.spmd import spmd

SINGLE = pages_with([block for block in PYTHON if not block.ranks and not block.title])
SHARDED = pages_with([block for block in PYTHON if block.ranks])
SCRIPTS = sorted({(page, block.ranks) for page, blocks in SHARDED.items() for block in blocks})

GUIDE_COMMANDS = {
    page: [command for on, command in commands_of(BLOCKS) if on == page and "dtcp.check" in command]
    for page in ("docs/add_a_model.md", "docs/write_a_mixer.md")
}
PRINTED = {
    ("docs/index.md", 2): r"\(1, 512, 64\) of \(1, 1024, 64\)",
    ("docs/index.md", 4): r"this rank's share of the loss: (\d\.\d{3})",
    ("docs/transformers.md", 4): r"step \d loss (\d\.\d{4})",
}


def test_every_python_block_is_run_here():
    run = [block for pages in (SINGLE, SHARDED) for blocks in pages.values() for block in blocks]
    assert {b.text for b in run} == {b.text for b in PYTHON if not b.title}
    files = {"before.py", "after.py", "running_mean.py", "lightning_model.py"}
    assert {b.title for b in PYTHON if b.title} == files


def test_every_block_is_python_or_a_command():
    assert {block.language for block in BLOCKS} == {"python", ""}


@pytest.mark.parametrize("page", SINGLE)
def test_blocks_of_one_process_run(page):
    namespace: dict[str, object] = {"__name__": "__main__"}
    with contextlib.redirect_stdout(io.StringIO()):
        for block in SINGLE[page]:
            exec(compile(block.text, page, "exec"), namespace)


@pytest.mark.slow_where(lambda page, ranks: page in ("docs/transformers.md", "docs/pipeline.md"))
@pytest.mark.parametrize(("page", "ranks"), SCRIPTS)
def test_blocks_of_ranks_run(page, ranks, tmp_path):
    """As one script, in a folder of its own."""
    for name, text in files_of(page).items():
        (tmp_path / name).write_text(text)
    script = tmp_path / "page.py"
    here = f"import os, sys\nos.chdir({str(tmp_path)!r})\nsys.path.insert(0, {str(tmp_path)!r})\n"
    script.write_text("\n".join([here, *(b.text for b in SHARDED[page] if b.ranks == ranks)]))
    ended = run_forked(script, ranks=ranks)
    assert ended.code == 0, ended
    if (page, ranks) not in PRINTED:
        assert ended.printed == ""
        return
    found = re.findall(PRINTED[page, ranks], ended.printed)
    assert found and len(found) % ranks == 0, ended.printed
    if page == "docs/transformers.md":
        # Three steps, alike on all ranks, and it learns.
        assert len(found) == 12 and len(set(found)) == 3 and min(found) < found[0]


@contextlib.contextmanager
def importable(files: dict[str, str], folder: Path) -> Iterator[None]:
    """Write files whose modules can be imported meanwhile."""
    for name, text in files.items():
        (folder / name).write_text(text)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in files:
            sys.modules.pop(Path(name).stem, None)


@pytest.mark.parametrize(
    ("page", "names", "layout"),
    [
        ("docs/add_a_model.md", ("after:SideBySide", "after:plan"), HeadTail),
        ("docs/write_a_mixer.md", ("running_mean:Model", "running_mean:plan"), Contiguous),
    ],
)
@spmd(ranks=2)
def test_what_a_guide_builds_is_right(mesh, page, names, layout, tmp_path):
    """What its command runs, on the pool: packed documents, every gradient, no graph break."""
    folder = tmp_path / f"rank{dist.get_rank()}"
    folder.mkdir()
    with importable(files_of(page), folder):
        checked = CheckedMixerModel(*names)
        options = CheckOptions(Degrees(cp=2), layout=layout, bound=1e-12)
        mesh = ParallelMesh.from_degrees(options.degrees, "cpu")
        result = compare(checked, options, mesh, Compile("aot_eager"))
        mixing = checked.mixing(checked.build(), options.style)
    report = CheckReport(mixing, options.bound, {"aot_eager": result})
    assert report.passed, lines(report, options)
    assert (result.graphs.graphs, result.graphs.breaks) == (1, 0)
    if page == "docs/write_a_mixer.md":
        # ceil(log2(2)) * B * (C + 1) numbers of 8 bytes each way, as its docstring promises.
        assert result.by_op["dtcp::ring_shift"].received == 2 * 17 * 8


def test_what_a_guide_starts_from_is_refused_as_printed(tmp_path, capsys):
    guide = (ROOT / "docs/add_a_model.md").read_text()
    (command, _) = GUIDE_COMMANDS["docs/add_a_model.md"]
    with importable(files_of("docs/add_a_model.md"), tmp_path):
        assert main(command.split()[3:]) == 1
    printed = guide.split(command)[1].split("```")[0].strip()
    assert capsys.readouterr().out.strip().endswith(printed)


@pytest.mark.slow
@pytest.mark.parametrize("page", GUIDE_COMMANDS)
def test_the_commands_of_a_guide_run_from_start_to_end(page, tmp_path):
    """In processes of their own: refused as it was, passed as it became."""
    for name, text in files_of(page).items():
        (tmp_path / name).write_text(text)
    *refused, passed = [
        run_python(*command.split()[1:], folder=tmp_path, PYTHONPATH=f"{ROOT}:{tmp_path}")
        for command in GUIDE_COMMANDS[page]
    ]
    assert all(ended.code == 1 and ended.printed.endswith("FAILED\n") for ended in refused)
    assert passed.code == 0, passed.output
    assert "graph breaks: 0" in passed.printed and passed.printed.endswith("PASSED\n")


def test_commands_name_what_exists():
    makefile = (ROOT / "Makefile").read_text()
    registry = (ROOT / "dtcp/pretrain/configs.py").read_text()
    extras = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    commands = commands_of(BLOCKS)
    assert len(commands) > 15
    for page, command in commands:
        words = command.split()
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), (page, command)
        if "-m" in words:
            module = ROOT / words[words.index("-m") + 1].replace(".", "/")
            known = module.is_dir() or module.with_suffix(".py").exists()
            assert known or module.name == "pytest", (page, command)
        if "train.py" in command and "--config" in words:
            assert f"def {words[words.index('--config') + 1]}()" in registry, (page, command)
        for extra in re.findall(r"\[(\w+)\]", command):
            assert extra in extras, (page, command)
