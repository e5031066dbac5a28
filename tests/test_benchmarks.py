"""Benchmarks import what is there: nothing else in the suite runs them."""

import importlib
from pathlib import Path

import pytest

FILES = sorted((Path(__file__).parents[1] / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("name", [file.stem for file in FILES])
def test_benchmark_can_be_imported(name):
    importlib.import_module(f"benchmarks.{name}")
