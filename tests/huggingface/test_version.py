"""Versions of transformers."""

from dtcp.torchtitan.hf_model import read_config

import pytest

from dtcp.check.checked_hf import CheckedHuggingFaceModel
from dtcp.huggingface import survey


@pytest.mark.parametrize("version", ["4.57.6", "5.9.0"])
def test_transformers_before_5_15_is_refused_by_name(monkeypatch, version):
    model = CheckedHuggingFaceModel("llama").build()
    monkeypatch.setattr("transformers.__version__", version)
    said = rf"from version 5\.15 on, got transformers={version}: pip install 'transformers>=5\.15'"
    with pytest.raises(ValueError, match=said):
        survey(model).check()
    with pytest.raises(ValueError, match=said):
        read_config.__wrapped__("llama")


@pytest.mark.parametrize("version", ["5.15.0", "5.25.0.dev0", "10.1"])
def test_transformers_from_5_15_on_is_served(monkeypatch, version):
    model = CheckedHuggingFaceModel("llama").build()
    monkeypatch.setattr("transformers.__version__", version)
    survey(model).check()
