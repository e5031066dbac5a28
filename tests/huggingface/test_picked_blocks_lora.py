"""LoRA on Qwen4 and MiniMax-M3: on attention, on features of n-grams, on what has no gradient."""

import pytest
from peft import LoraConfig, inject_adapter_in_model

from dtcp.check.parity import seeded
from dtcp.check.true_fp64 import TrueFP64
from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.huggingface.survey import survey
from dtcp.parallelize import parallelize_hf
from tests.harness.spmd import spmd
from tests.huggingface.test_huggingface import assert_same_step
from tests.huggingface.test_lora import adapted, on_mesh_of
from tests.huggingface.test_picked_blocks import BOTH, CHECKED

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "key_proj", "value_proj", "index_qk_proj")


@pytest.mark.slow_where(lambda degrees, checked: degrees.cp == 1)
@BOTH
@pytest.mark.parametrize("degrees", [Degrees(cp=2), Degrees(tp=2), Degrees(dp_shard=2)])
@spmd(ranks=2)
def test_lora_on_attention_ngrams_and_indexer_equals_one_device(mesh, degrees, checked):
    """The indexer's picks otherwise, and is not trained: its choice has no gradient."""
    with TrueFP64():
        reference, model = (adapted(targets=TARGETS, model=seeded(checked)) for _ in range(2))
        assert_same_step(reference, *on_mesh_of(model, degrees))
    for each in (reference, model):
        trained = {name for name, p in each.named_parameters() if p.requires_grad}
        without = {name for name, p in each.named_parameters() if p.grad is None} & trained
        assert without == {name for name in trained if ".indexer." in name} != set()


@pytest.mark.slow
@spmd(ranks=4)
def test_lora_on_every_linear_layer_beside_tp_equals_one_device(mesh):
    every = {"target_modules": "all-linear"}
    with TrueFP64():
        reference, model = (
            adapted(targets=(), model=seeded(CHECKED), config=every) for _ in range(2)
        )
        assert_same_step(reference, *on_mesh_of(model, Degrees(cp=2, tp=2)))


def test_lora_on_the_convolution_of_ngrams_is_refused():
    """On one device it would have an effect: here its weight is read."""
    model = seeded(CHECKED)
    inject_adapter_in_model(LoraConfig(r=64, target_modules=["ple.conv1d"]), model)
    refused = survey(model).refused
    assert "ple.conv1d (an adapter): Qwen4ExpTextPLELayer reads the weight" in " ".join(refused)


@spmd(ranks=2)
def test_lora_on_experts_of_a_model_that_picks_blocks_is_refused(mesh):
    experts = {"target_parameters": ["experts.gate_up_proj"], "target_modules": ["q_proj"]}
    model = adapted(targets=(), model=seeded(CHECKED), config=experts)
    with pytest.raises(ValueError, match=r"adapters on .*experts.*: leave experts out"):
        parallelize_hf(model, ParallelMesh.from_degrees(Degrees(cp=2), "cpu"))
