"""Qwen4 and MiniMax-M3, unmodified: their indexers pick blocks of tokens; Qwen4 hashes n-grams.

Held against themselves on one device in fp64, one document at a time.
"""

from contextlib import nullcontext

import pytest
import torch
from torch.testing import assert_close

from dtcp.check.checked_hf import CheckedHuggingFaceModel
from dtcp.check.parity import CheckOptions, compare, seeded
from dtcp.check.true_fp64 import TrueFP64
from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.huggingface import install_mixers
from dtcp.huggingface.registry import MIXER
from dtcp.mixer_metadata import batch_metadata
from dtcp.parallelize import Compile
from dtcp.parallelize.plans.mixer_styles import carried_out_by
from dtcp.recurrent import CausalConv1d
from dtcp.sequence.block_balanced import BlockBalanced
from dtcp.sequence.document_balanced import DocumentBalanced
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import Contiguous, HeadTail
from dtcp.sequence.per_document import PerDocument
from dtcp.softmax import AllGatherAttention, HaloAttention, RingAttention, UlyssesAttention
from dtcp.sparse_blocks import ScoredBlockAttention, SparseBlockAttention, SparseBlockCP
from tests.harness.spmd import spmd

KIND, END = "qwen4_exp_text", 5
SCORED = CheckedHuggingFaceModel("minimax_m3_vl_text", {})
# With so many heads of the indexer no score is 0 (small_sizes.py): torch.topk picks any of equal
# ones, and a mixer the first. Halos of the n-grams' convolution, 3 x 2, are shorter than segments.
CHECKED = CheckedHuggingFaceModel(
    KIND,
    {
        "ple_conv_kernel_size": 3,
        "hc_count": 2,
        "output_gate_type": "sigmoid",
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.5,
        },
    },
)


BOTH = pytest.mark.parametrize("checked", [CHECKED, SCORED], ids=lambda each: each.config)


def assert_step_equal(degrees, layout=HeadTail, *, compile=None, ranks_per_node=0, checked=CHECKED):
    """Assert that loss and every gradient on packed rows are those of one device."""
    mesh = ParallelMesh.from_degrees(degrees, "cpu", ranks_per_node=ranks_per_node)
    options = CheckOptions(degrees, layout=layout, seq_len=72)
    # The square root of a gate makes much of what norms in fp32 round. Graphs have their own casts.
    with TrueFP64() if compile is None else nullcontext():
        result = compare(checked, options, mesh, compile)
    wrong = {name: error for name, error in result.errors.items() if not error <= 1e-5}
    assert not wrong, wrong
    return result


@pytest.mark.slow_where(lambda ranks, checked: ranks != 2)
@BOTH
@spmd(ranks=(2, 3, 4))
def test_model_that_picks_blocks_equals_the_unmodified_one(mesh, checked, ranks):
    """What travels are index keys and, there and back, keys and values."""
    result = assert_step_equal(Degrees(cp=ranks), checked=checked)
    there = result.by_op["dtcp::gather_shared_kv"]
    back = result.by_op["dtcp::gather_shared_kv_backward"]
    assert (there.calls, back.calls) == (2, 1)
    # 8 channels of a key; of Qwen4 4 of rotary tables, that is half of each; 2 heads of 8 + 8.
    of_index, of_attention = (8 + 4 * (checked == CHECKED)) * 8, 2 * (8 + 8) * 8
    assert there.received % (of_index + of_attention) == back.received % of_attention == 0
    assert there.received > 0


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("layout", [Contiguous, PerDocument, BlockBalanced, DocumentBalanced])
@spmd(ranks=2)
def test_every_layout_equals_one_device(mesh, layout, checked):
    assert_step_equal(Degrees(cp=2), layout, checked=checked)


@pytest.mark.slow
@BOTH
@spmd(ranks=2)
def test_compiled_model_equals_one_device(mesh, checked):
    result = assert_step_equal(Degrees(cp=2), compile=Compile("aot_eager"), checked=checked)
    assert result.graphs.breaks == 0


@pytest.mark.slow
@BOTH
@spmd(ranks=4)
def test_model_beside_tp_fsdp_and_on_two_nodes(mesh, checked):
    assert_step_equal(Degrees(cp=2, tp=2), checked=checked)
    assert_step_equal(Degrees(dp_shard=2, cp=2), Contiguous, checked=checked)
    assert_step_equal(Degrees(cp=4), DocumentBalanced, ranks_per_node=2, checked=checked)


def test_layers_have_the_mixers_that_they_need():
    model = seeded(CHECKED)
    surveyed = install_mixers(model)
    assert surveyed.givers == ("model.layers.0",)
    linear, indexed = model.model.layers
    mixer = indexed.self_attn.get_submodule(MIXER)
    assert type(mixer) is SparseBlockAttention
    assert (mixer.num_blocks, mixer.block_len, mixer.scale) == (2, 4, 8**-0.5)
    convs = [m for m in linear.ple.modules() if isinstance(m, CausalConv1d)]
    assert sorted((m.width, m.dilation) for m in convs) == [(3, 1), (3, 3)]


def test_blocks_that_are_scored_are_picked_for_each_head_of_keys():
    plain, sparse = install_mixers(seeded(SCORED)).attentions
    assert plain.blocks == () and sparse.blocks == (ScoredBlockAttention, 2, 4, 1)
    assert type(sparse.mixer()) is ScoredBlockAttention


def test_block_indices_of_another_kind_are_refused():
    """transformers' own, of a model whose indexer is not known here."""
    model = seeded(SCORED)
    type_of_own = type("Indexer", (type(model.model.layers[1].self_attn.indexer),), {})
    model.model.layers[1].self_attn.indexer.__class__ = type_of_own
    with pytest.raises(ValueError, match=r"layers.1.self_attn .* called with block_indices"):
        install_mixers(model)


def test_an_index_of_other_heads_than_the_keys_is_refused():
    model = seeded(CheckedHuggingFaceModel(SCORED.config, {"index_n_heads": 4}))
    with pytest.raises(ValueError, match=r"picks blocks for 4 heads, and the keys .* have 2: give"):
        install_mixers(model)


def test_ngrams_end_with_their_text_and_with_their_document():
    """Rows of few ids, the end among them, against each document by itself."""
    model, own = seeded(CHECKED), seeded(CHECKED).model.layers[0].ple
    install_mixers(model)
    documents = Documents(((1, 2, 20, 9), (32,)), 32)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(END - 2, END + 1, (2, 32), generator=draw)
    x = torch.randn(2, 32, own.hc_count * own.hidden_size, generator=draw, dtype=torch.float64)
    metadata = batch_metadata(model, documents)
    with TrueFP64():
        actual = model.model.layers[0].ple(x, ids, attn_metadata=metadata)
    for row, lengths in enumerate(documents.lengths):
        parts = zip(x[row].split(lengths), ids[row].split(lengths), strict=True)
        with TrueFP64():
            expected = [own(part[None], tokens[None], None)[0] for part, tokens in parts]
        assert_close(actual[row], torch.cat(expected))


def test_a_strategy_that_does_not_bring_all_keys_is_refused():
    surveyed, *_ = install_mixers(seeded(CHECKED)).attentions
    for style in (UlyssesAttention(), HaloAttention(7), RingAttention(tile=5)):
        with pytest.raises(ValueError, match=r"brings the keys and values of all .*SparseBlockCP"):
            carried_out_by(surveyed, style)
    given = AllGatherAttention(ranks_per_node=2, reduce_dtype=torch.float32)
    expected = SparseBlockCP(ranks_per_node=2, reduce_dtype=torch.float32)
    assert carried_out_by(surveyed, given) == expected
