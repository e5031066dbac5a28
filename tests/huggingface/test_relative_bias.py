"""Inkling: unmodified models, whose queries bias their scores by distance.

Held against themselves on one device in fp64, one document at a time.
"""

from contextlib import nullcontext

import pytest

from dtcp.check.checked_hf import CheckedHuggingFaceModel
from dtcp.check.parity import CheckOptions, compare, seeded
from dtcp.check.true_fp64 import TrueFP64
from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.huggingface import install_mixers
from dtcp.huggingface.registry import MIXER
from dtcp.parallelize import Compile
from dtcp.recurrent import CausalConv1d
from dtcp.sequence.document_balanced import DocumentBalanced
from dtcp.sequence.layout import Contiguous, HeadTail
from dtcp.sequence.masks import Causal, SlidingWindow
from dtcp.softmax import AllGatherAttention, HybridAttention, RingAttention, UlyssesAttention
from tests.harness.spmd import spmd

# Documents longer than profiles and than the floor of what scales by position.
FIELDS = {
    "rel_extent": 9,
    "sliding_window_size": 6,
    "log_scaling_n_floor": 5,
    "log_scaling_alpha": 0.5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
}
SLIDING, FULL = "hybrid_sliding", "hybrid"
BLOCKS = {
    "num_hidden_layers": 3,
    "layer_types": [SLIDING, FULL, FULL],
    "n_layers_per_attn_res_block": 2,
}
LOOP = {
    "num_hidden_layers": 5,
    "layer_types": [SLIDING, FULL, SLIDING, FULL, SLIDING],
    "loop_layer_index_start": 2,
    "loop_layer_index_end": 4,
    "loop_num_passes": 2,
}
CHECKED = {
    "inkling": CheckedHuggingFaceModel("inkling_text", FIELDS),
    "inkling2": CheckedHuggingFaceModel("inkling2_text", {**FIELDS, **BLOCKS}),
    "loop": CheckedHuggingFaceModel("inkling2_loop_text", {**FIELDS, **BLOCKS, **LOOP}),
}
each_kind = pytest.mark.parametrize("kind", CHECKED)


def assert_step_equal(kind, degrees, layout=HeadTail, style=None, *, compile=None):
    """Assert that loss and every gradient on packed rows are those of one device."""
    style = style or RingAttention()
    options = CheckOptions(degrees, style, layout, seq_len=72)
    # Graphs have casts of their own.
    with TrueFP64() if compile is None else nullcontext():
        result = compare(CHECKED[kind], options, ParallelMesh.from_degrees(degrees, "cpu"), compile)
    most = 1e-7 if compile is None else 1e-5
    wrong = {name: error for name, error in result.errors.items() if not error <= most}
    assert not wrong, wrong
    return result


@pytest.mark.slow_where(lambda kind, ranks: ranks != 2 or kind == "inkling2")
@each_kind
@spmd(ranks=(2, 3, 4))
def test_model_of_relative_bias_equals_the_unmodified_one(mesh, kind, ranks):
    assert_step_equal(kind, Degrees(cp=ranks))


@pytest.mark.slow
@spmd(ranks=2)
def test_every_strategy_and_layout_equals_one_device(mesh):
    for layout, style in (
        (Contiguous, AllGatherAttention()),
        (DocumentBalanced, UlyssesAttention()),
        (HeadTail, HybridAttention(inner_ranks=2)),
    ):
        assert_step_equal("inkling2", Degrees(cp=2), layout, style)


@pytest.mark.slow
@spmd(ranks=2)
def test_compiled_model_equals_one_device(mesh):
    result = assert_step_equal("inkling", Degrees(cp=2), compile=Compile("aot_eager"))
    assert result.graphs.breaks == 0


@pytest.mark.slow
@each_kind
@spmd(ranks=4)
def test_model_beside_tp_and_fsdp(mesh, kind):
    assert_step_equal(kind, Degrees(cp=2, tp=2))
    assert_step_equal(kind, Degrees(dp_shard=2, cp=2), Contiguous)


def test_layers_have_the_mixers_that_they_need():
    model = seeded(CHECKED["inkling"])
    surveyed = install_mixers(model)
    assert surveyed.givers == ("model.layers.0", "model.layers.1")
    mixers = [layer.self_attn.get_submodule(MIXER) for layer in model.model.layers]
    assert {str(m.mask) for m in mixers} == {str(Causal()), str(Causal() & SlidingWindow(6))}
    convs = [m.width for m in model.modules() if isinstance(m, CausalConv1d)]
    assert convs == [4] * 8
