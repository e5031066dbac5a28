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
CHECKED = CheckedHuggingFaceModel(
    "inkling_text",
    {
        "rel_extent": 9,
        "sliding_window_size": 6,
        "log_scaling_n_floor": 5,
        "log_scaling_alpha": 0.5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
    },
)


def assert_step_equal(degrees, layout=HeadTail, style=None, *, compile=None):
    """Assert that loss and every gradient on packed rows are those of one device."""
    style = style or RingAttention()
    options = CheckOptions(degrees, style, layout, seq_len=72)
    # Graphs have casts of their own.
    with TrueFP64() if compile is None else nullcontext():
        result = compare(CHECKED, options, ParallelMesh.from_degrees(degrees, "cpu"), compile)
    most = 1e-7 if compile is None else 1e-5
    wrong = {name: error for name, error in result.errors.items() if not error <= most}
    assert not wrong, wrong
    return result


@pytest.mark.slow_where(lambda ranks: ranks != 2)
@spmd(ranks=(2, 3, 4))
def test_model_of_relative_bias_equals_the_unmodified_one(mesh, ranks):
    assert_step_equal(Degrees(cp=ranks))


@pytest.mark.slow
@spmd(ranks=2)
def test_every_strategy_and_layout_equals_one_device(mesh):
    for layout, style in (
        (Contiguous, AllGatherAttention()),
        (DocumentBalanced, UlyssesAttention()),
        (HeadTail, HybridAttention(inner_ranks=2)),
    ):
        assert_step_equal(Degrees(cp=2), layout, style)


@pytest.mark.slow
@spmd(ranks=2)
def test_compiled_model_equals_one_device(mesh):
    result = assert_step_equal(Degrees(cp=2), compile=Compile("aot_eager"))
    assert result.graphs.breaks == 0


@pytest.mark.slow
@spmd(ranks=4)
def test_model_beside_tp_and_fsdp(mesh):
    assert_step_equal(Degrees(cp=2, tp=2))
    assert_step_equal(Degrees(dp_shard=2, cp=2), Contiguous)


def test_layers_have_the_mixers_that_they_need():
    model = seeded(CHECKED)
    surveyed = install_mixers(model)
    assert surveyed.givers == ("model.layers.0", "model.layers.1")
    mixers = [layer.self_attn.get_submodule(MIXER) for layer in model.model.layers]
    assert {str(m.mask) for m in mixers} == {str(Causal()), str(Causal() & SlidingWindow(6))}
    convs = [m.width for m in model.modules() if isinstance(m, CausalConv1d)]
    assert convs == [4] * 8
