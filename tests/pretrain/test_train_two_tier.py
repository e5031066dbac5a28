"""train.py over nodes: the number is given or torchrun's, and every family loses as one device."""

import pytest

from dtcp.pretrain.config_check import check_nodes
from dtcp.pretrain.options import parse
from tests.harness.train_run import trained

FAMILIES = ("llama_tiny", "qwen3_5_tiny", "gemma4_tiny", "deepseek_v4_tiny")
ON_NODES = (
    *("--compile.no-enable", "--validator.no-enable", "--dtcp.ranks_per_node", "2"),
    *("--parallelism.context_parallel_degree", "4", "--parallelism.tensor_parallel_degree", "1"),
    *("--training.seq_len", "512"),
)


@pytest.mark.parametrize(
    ("cp", "tp", "nodes", "fits"),
    [(4, 1, 2, True), (2, 2, 2, True), (2, 2, 8, True), (2, 2, 3, False), (6, 1, 4, False)],
)
def test_two_tier_nodes_that_cut_cp_unevenly_are_refused_before_ranks_start(cp, tp, nodes, fits):
    config = parse(
        [
            *("--parallelism.context_parallel_degree", str(cp)),
            *("--parallelism.tensor_parallel_degree", str(tp)),
            *("--dtcp.ranks_per_node", str(nodes)),
        ]
    )
    if fits:
        check_nodes(config)
        return
    with pytest.raises(ValueError, match=f"equally many neighbours .* got ranks_per_node={nodes}"):
        check_nodes(config)


@pytest.mark.slow
@pytest.mark.parametrize("config", FAMILIES)
def test_two_tier_family_verifies_against_one_device(config, tmp_path):
    """Four ranks as two nodes, documents dealt out by DocumentBalanced."""
    output = trained(
        *("--training.steps", "2", *ON_NODES, "--dtcp.verify", "2"),
        *("--dtcp.layout", "document_balanced", "--dump_folder", str(tmp_path)),
        config=config,
        ranks=4,
    )
    assert "the losses of 2 steps agree" in output


@pytest.mark.slow
def test_two_tier_run_says_what_comes_from_other_nodes(tmp_path):
    output = trained(
        *("--training.steps", "2", *ON_NODES, "--dtcp.strategy", "all_gather", "--dtcp.forecast"),
        *("--dump_folder", str(tmp_path)),
        config="llama_tiny",
        ranks=4,
    )
    assert "AllGatherAttention(boundary=InGraph(), ranks_per_node=2" in output
    assert "for cp, 1.000 of what is expected, " in output and "from other nodes" in output
