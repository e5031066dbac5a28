"""Benchmarks import what is there: nothing else in the suite runs them."""

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "benchmarks").rglob("*.py"))
NAMES = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in FILES]


@pytest.mark.parametrize("name", [name for name in NAMES if not name.endswith("__init__")])
def test_benchmark_can_be_imported(name):
    importlib.import_module(name)
