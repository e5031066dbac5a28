"""torchtitan's own decoders on cp 2 x tp 2 in fp64: logits and every gradient of one device."""

from types import SimpleNamespace

from dtcp.torchtitan.compat import float64_by_name
from dtcp.torchtitan.parallelize import parallelize_decoder
from dtcp.torchtitan.section import Section

import pytest
from torch.distributed.tensor import DTensor
from torch.testing import assert_close
from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig
from torchtitan.distributed import ParallelDims

from dtcp.batch import shard_batch
from dtcp.distributed.mesh import ParallelMesh
from dtcp.pretrain.adopt import adopt_model
from dtcp.sequence.document_balanced import DocumentBalanced
from tests.harness import titan_models as titan
from tests.harness.spmd import spmd

DEGREES = ParallelismConfig(
    context_parallel_degree=2, tensor_parallel_degree=2, spmd_backend="partial_dtensor"
)


@pytest.mark.slow_where(lambda name: name != "gpt_oss")
@pytest.mark.parametrize("name", ["gpt_oss", "llama3", "qwen3_moe", "deepseek_v3"])
@spmd(axes={"cp": 2, "tp": 2})
def test_a_decoder_on_cp_and_tp_has_the_gradients_of_one_device(mesh, name):
    """Of gpt-oss, the bias behind attention, too, whose gradient torchtitan 0.3.0 makes half."""
    expected, expected_grads = titan.titans_own(titan.small(getattr(titan, name)))
    with titan.settled(), float64_by_name():
        dims = ParallelDims.from_config(DEGREES, 4)
        dims.build_mesh()
        model = on_mesh(name, dims)
        tokens, documents = titan.rows()
        local, sharded = shard_batch(
            {"input_ids": tokens, "position_ids": documents.position_ids()},
            ParallelMesh.from_parallel_dims(dims),
            DocumentBalanced,
            model=model,
            documents=documents,
        )
        logits = model(
            local["input_ids"],
            positions=local["position_ids"],
            attention_masks=sharded.attn_metadata,
        )
        share = logits * whole_vocabulary(sharded.shard(titan.cotangent(expected)), logits)
        share.sum().backward()
    assert_close(logits.full_tensor().detach(), sharded.shard(expected))
    actual = {name: each.grad.full_tensor() for name, each in model.named_parameters()}
    assert actual.keys() == expected_grads.keys()
    # Of a mean over tokens: routers of torchtitan score them in fp32, whatever the model has.
    for name, gradient in actual.items():
        assert_close(gradient / tokens.numel(), expected_grads[name] / tokens.numel())


def on_mesh(name, dims):
    """The model as the trainer parallelizes it, of the weights that one device has."""
    spec = adopt_model(titan.small(getattr(titan, name)))
    spec.model.update_from_config(config=SimpleNamespace(parallelism=DEGREES))
    return parallelize_decoder(
        titan.build(spec),
        parallel_dims=dims,
        training=TrainingConfig(
            mixed_precision_param="float64",
            mixed_precision_reduce="float64",
            disable_cuda_graphs=True,
        ),
        parallelism=DEGREES,
        compile_config=CompileConfig(enable=False),
        ac_config=None,
        dump_folder="",
        section=Section(ranks_per_node=4),
    )


def whole_vocabulary(cotangent, logits):
    """A cotangent [B, L, V] as a DTensor that multiplies logits sharded in V."""
    replicated = DTensor.from_local(cotangent, logits.device_mesh, run_check=False)
    return replicated.redistribute(placements=logits.placements)
