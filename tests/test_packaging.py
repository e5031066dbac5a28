"""One package, the same from a checkout and from a wheel, whatever folders lie beside it."""

import importlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from dtcp.torchtitan.hf_model import read_config

import pytest

import train
from dtcp.check.__main__ import main as check
from dtcp.plan.__main__ import run_planner
from dtcp.pretrain.__main__ import start_training
from dtcp.pretrain.options import parse
from tests.docs.blocks import blocks_of

ROOT = Path(__file__).parent.parent
SOURCE = ("dtcp", "models", "parallelize", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
EXAMPLES = [block for block in blocks_of(ROOT / "README.md") if block.ranks]
TRITON_OF_TORCH = {"2.13.0": "3.7.1"}
"""What a build of torch for CUDA asks for; one for CPUs names no triton, so it cannot be asked."""


def python(*arguments: str, folder: Path, path: Path | None = None) -> str:
    """What this Python prints in a folder, with one more place to import from; it must succeed."""
    ran = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(path or ""), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout
    return ran.stdout


@pytest.mark.parametrize("name", ["launch", "compiler", "sources", "plot", "report"])
def test_the_launcher_does_not_need_torchtitan(name):
    text = (ROOT / f"dtcp/pretrain/{name}.py").read_text()
    assert not re.search(r"^\s*(from|import) (torchtitan|dtcp\.torchtitan)", text, re.MULTILINE)


def test_the_shim_is_imported_before_torchtitan():
    """torchtitan binds its device when it is imported."""
    importing = re.compile(r"^(?:from|import) (dtcp\.torchtitan|torchtitan)\b", re.MULTILINE)
    first = {
        path.name: importing.findall(path.read_text())[:1]
        for path in (ROOT / "dtcp/pretrain").glob("*.py")
    }
    assert {names[0] for names in first.values() if names} == {"dtcp.torchtitan"}


def test_constraints_name_the_triton_that_torch_asks_for():
    """Else pip refuses the pair, and no command of the Makefile gets past it."""
    pinned = re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    versions = dict(pinned)
    assert versions["triton"] == TRITON_OF_TORCH[versions["torch"]]


FAKE_PYTHON = """#!/bin/sh
if [ "$1" = -m ]; then exit; fi
exec {python} -c 'import sys; sys.version_info = {version}; exec(sys.argv[1])' "$2"
"""


def make_venv(folder, *options):
    """What make does for a .venv in a folder, whose scripts come first on the PATH."""
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
    command = ("make", "--no-print-directory", f"{folder}/bin/python", f"VENV={folder}", *options)
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def fake_python(path, *version):
    path.parent.mkdir(exist_ok=True)
    path.write_text(FAKE_PYTHON.format(python=sys.executable, version=(*version, 0)))
    path.chmod(0o755)


def test_make_passes_over_a_python_that_torch_has_no_build_for(tmp_path):
    for name, version in {"python3": (3, 15), "python3.14": (3, 10), "python3.13": (3, 13)}.items():
        fake_python(tmp_path / name, *version)
    made = make_venv(tmp_path)
    assert made.stdout == f"python3.13 -m venv {tmp_path}\n", made.stderr


def test_make_takes_the_python_that_is_named_and_no_other(tmp_path):
    python = tmp_path / "a folder/python3"
    fake_python(python, 3, 12)
    made = make_venv(tmp_path, f"PYTHON={python}")
    assert made.stdout == f"{python} -m venv {tmp_path}\n", made.stderr
    fake_python(python, 3, 15)
    refused = make_venv(tmp_path, f"PYTHON={python}")
    assert refused.returncode
    assert f"3.14 with venv and pip, got {python}: install" in refused.stderr


@pytest.mark.parametrize("package", ["torchtitan", "tensorboard", "matplotlib", "xxhash"])
@pytest.mark.parametrize("start", [train.main, start_training])
def test_training_without_its_extra_is_one_sentence(start, package, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    assert start([]) == 2
    said = capsys.readouterr()
    assert package in said.err and "pip install 'dtcp[train]'" in said.err and not said.out


def test_training_by_another_python_than_make_installed_for_names_that_one(
    monkeypatch, capsys, tmp_path
):
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv/train.stamp").touch()
    monkeypatch.setattr(train, "__file__", str(tmp_path / "train.py"))
    monkeypatch.setitem(sys.modules, "xxhash", None)
    assert train.main([]) == 2
    assert f"source {tmp_path}/.venv/bin/activate" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--model.hf", "--model.dtcp"])
def test_training_a_model_of_transformers_without_it_is_one_sentence(option, monkeypatch):
    read_config.cache_clear()
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"got 'llama', and .*: pip install 'dtcp\[hf\]'.$"):
        parse([option, "llama"])


@pytest.mark.parametrize("package", ["accelerate", "transformers"])
def test_trainers_without_their_extra_are_one_sentence(package, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("dtcp.trainers")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"pip install 'dtcp\[hf\]'"):
        importlib.import_module("dtcp.trainers")


def test_checking_a_model_of_transformers_without_it_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert check(["--hf-config", "llama"]) == 2
    said = capsys.readouterr()
    assert "pip install 'dtcp[hf]'" in said.err and not said.out


@pytest.mark.parametrize(
    ("package", "source"),
    [("transformers", ("--hf-config", "llama")), ("torchtitan", ("--config", "llama3_8b_128k"))],
)
def test_planning_without_an_extra_is_one_sentence(package, source, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith(("dtcp.torchtitan", package))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "dtcp.pretrain.configs", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    assert run_planner([*source, "--cluster", "8xH100"]) == 2
    said = capsys.readouterr()
    assert said.err.count("pip install 'dtcp[") == said.err.count("\n") == 1 and not said.out


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an sdist and a wheel, made of a checkout without git."""
    checkout = tmp_path_factory.mktemp("checkout")
    for name in SOURCE:
        place = ROOT / name
        if place.is_dir():
            shutil.copytree(place, checkout / name, symlinks=True)
        else:
            shutil.copy(place, checkout)
    python("-m", "build", "--no-isolation", folder=checkout)
    return checkout / "dist"


@pytest.fixture(scope="module")
def installed(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the wheel has been installed."""
    target = tmp_path_factory.mktemp("site")
    (wheel,) = dist.glob("*.whl")
    pip = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target))
    python(*pip, str(wheel), folder=dist)
    return target


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A repository of somebody's own, whose folders have the names of ours."""
    for name in ("models", "parallelize", "tests"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("THEIRS = True\n")
    return tmp_path


@pytest.mark.slow
def test_a_wheel_holds_one_package_and_an_sdist_makes_the_same_wheel(dist, tmp_path):
    """`python -m build` makes its wheel of the sdist; the other one is made of the checkout."""
    python("-m", "twine", "check", "--strict", *map(str, dist.iterdir()), folder=tmp_path)
    arguments = ("--no-isolation", "--wheel", "--outdir", str(tmp_path))
    python("-m", "build", *arguments, folder=dist.parent)
    by_sdist, by_checkout = (
        zipfile.ZipFile(wheel) for folder in (dist, tmp_path) for wheel in folder.glob("*.whl")
    )
    names = by_sdist.namelist()
    assert {name.partition("/")[0] for name in names} == {"dtcp", "dtcp-0.1.0.dist-info"}
    assert {"dtcp/models/llama/model.py", "dtcp/parallelize/apply.py", "dtcp/py.typed"} < {*names}
    assert sorted(names) == sorted(by_checkout.namelist())
    assert all(by_sdist.read(name) == by_checkout.read(name) for name in names)


@pytest.mark.slow
def test_a_wheel_is_imported_beside_folders_of_the_same_names(installed, work):
    script = """
import models, parallelize, tests
import dtcp, dtcp.check, dtcp.models, dtcp.parallelize, dtcp.pretrain.launch
from dtcp.models import deepseek_v4, gemma4, llama, qwen3_5
from dtcp.parallelize import parallelize_hf
assert models.THEIRS and parallelize.THEIRS and tests.THEIRS
print(dtcp.__file__, llama.__file__, dtcp.parallelize.__file__, sep="\\n")
"""
    places = python("-c", script, folder=work, path=installed).splitlines()
    assert all(Path(place).is_relative_to(installed / "dtcp") for place in places)


@pytest.mark.slow
def test_a_wheel_trains(installed, work):
    command = ("-m", "dtcp.pretrain", "--config", "llama_tiny_fsdp4", "--training.steps", "1")
    output = python(*command, "--compile.no-enable", folder=work, path=installed)
    assert re.search(r"^step +1/1  loss  5\.", output, re.MULTILINE), output
    assert (work / "outputs/llama_tiny_fsdp4/loss.png").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("index", range(2))
def test_the_examples_of_the_readme_run_from_a_wheel(installed, work, index):
    (work / "example.py").write_text(EXAMPLES[index].text)
    ranks = str(EXAMPLES[index].ranks)
    agent = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks)
    assert python(*agent, "example.py", folder=work, path=installed)
