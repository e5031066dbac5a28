"""train.py where documents are dealt out by DocumentBalanced: every family loses as one device."""

import pytest

from tests.harness.train_run import train

FAMILIES = ("llama_tiny", "qwen3_5_tiny", "gemma4_tiny", "deepseek_v4_tiny")


@pytest.mark.slow
@pytest.mark.parametrize("config", FAMILIES)
def test_family_on_balanced_documents_verifies_against_one_device(config, tmp_path):
    """The tiny configs as they are, without the compiler: cp 2 x tp 2."""
    code, output = train(
        *("--training.steps", "2", "--compile.no-enable", "--validator.no-enable"),
        *("--dtcp.layout", "document_balanced", "--dtcp.verify", "2"),
        *("--dump_folder", str(tmp_path)),
        module="dtcp.pretrain.configs",
        config=config,
        ranks=4,
    )
    assert code == 0, output
    assert "the losses of 2 steps agree" in output
