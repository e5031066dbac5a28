"""The parts of the adapter, in this process and without ranks."""

import json
from dataclasses import replace

from dtcp.torchtitan import compat
from dtcp.torchtitan.model_spec import llama, spec_of
from dtcp.torchtitan.section import LAYOUT_CLASSES, Section

import pytest
import torch

from dtcp.compile import EagerIsland
from dtcp.models.llama import PRESETS, config_from_hf
from dtcp.parallelize.plans.families import LLAMA
from dtcp.pretrain import configs
from dtcp.sequence.layout import SequenceLayout
from dtcp.softmax import AllGatherAttention, RingAttention
from dtcp.softmax.style import AttentionStyle


def test_the_cpu_device_answers_all_that_torchtitan_asks():
    device = compat.CpuDevice()
    assert device.current_device() == 0
    assert (
        device.get_device_properties().total_memory
        > device.memory_stats()["reserved_bytes.all.peak"]
    )
    device.synchronize()


@pytest.mark.parametrize("strategy", ["default", "ring", "all_gather", "ulysses", "hybrid"])
@pytest.mark.parametrize(
    ("boundary", "reduce_dtype"), [("in_graph", "model"), ("eager_island", "float32")]
)
def test_a_section_names_classes_and_their_options(strategy, boundary, reduce_dtype):
    section = Section(strategy=strategy, boundary=boundary, reduce_dtype=reduce_dtype)
    for device_type in ("cpu", "cuda"):
        style = section.attention_style(device_type)
        assert isinstance(style, AttentionStyle)
        found = (isinstance(style.boundary, EagerIsland), style.reduce_dtype)
        assert found == ((True, torch.float32) if boundary == "eager_island" else (False, None))
    assert all(issubclass(layout, SequenceLayout) for layout in LAYOUT_CLASSES.values())


def test_a_section_names_the_strategy_of_its_devices_where_nobody_does():
    section = Section(boundary="eager_island")
    assert section.attention_style("cpu") == RingAttention(boundary=EagerIsland())
    assert section.attention_style("cuda") == AllGatherAttention(boundary=EagerIsland())


def test_weights_go_to_hugging_face_names_and_back():
    spec = configs.qwen3_tiny().model_spec
    adapter = spec.state_dict_adapter(spec.model, None)
    weights = spec.model.build().state_dict()
    theirs = adapter.to_hf(weights)
    assert "model.layers.0.self_attn.q_norm.weight" in theirs and "lm_head.weight" not in theirs
    ours = adapter.from_hf(theirs)
    assert ours.keys() == weights.keys()
    assert all(torch.equal(ours[name], weights[name]) for name in weights)


@pytest.mark.parametrize("name", [*PRESETS])
def test_an_exported_config_is_read_back(name):
    spec = llama(name, PRESETS[name])
    theirs = spec.state_dict_adapter(spec.model, None).hf_config()
    assert config_from_hf(json.loads(json.dumps(theirs))) == PRESETS[name]


def test_a_family_of_ones_own_has_its_own_plan_and_no_stages_of_another():
    family = replace(LLAMA, name="own", plan=lambda *_: pytest.fail("is only handed on"))
    spec = spec_of(family, "tiny", configs.BYTE_SHAPE)
    assert spec.parallelize_fn.keywords["plan"] is family.plan
    assert spec.pipelining_fn is None
    assert spec.model.stage_refusal() == "layers of own are not cut into stages"
    assert llama("tiny", configs.BYTE_SHAPE).pipelining_fn is not None
