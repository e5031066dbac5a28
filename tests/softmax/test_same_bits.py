"""Logits that do not depend on the number of ranks, to the last bit."""

import copy

import pytest
import torch

from dtcp.batch import shard_batch
from dtcp.distributed.mesh import ParallelMesh
from dtcp.mixer_metadata import batch_metadata
from dtcp.models import gemma4, llama
from dtcp.parallelize import gemma4_plan, llama_plan, parallelize
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import Contiguous, HeadTail
from dtcp.softmax import AllGatherAttention
from tests.harness.spmd import spmd

DOCUMENTS = Documents(((300, 1, 723), (1024,)), 1024)
FAMILIES = {
    "llama": (llama.Llama, llama.PRESETS["tiny"], llama_plan),
    "gemma4": (gemma4.Gemma4, gemma4.PRESETS["tiny"], gemma4_plan),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@spmd(ranks=2)
def test_logits_of_gathered_keys_are_one_devices_to_the_bit(mesh, family, dtype):
    """Chunks are whole tiles of queries, and a tile takes its keys in token order, as on one."""
    build, config, plan = FAMILIES[family]
    model = build(config)
    model.init_weights()
    alone = copy.deepcopy(model).to(dtype)
    ids = torch.randint(config.vocab_size, (2, 1024))
    position_ids = DOCUMENTS.position_ids()
    expected = alone(ids, position_ids, batch_metadata(alone, DOCUMENTS))
    on_cp = ParallelMesh.from_device_mesh(mesh)
    parallelize(model.to(dtype), on_cp, plan(config, on_cp, AllGatherAttention()))
    rows = {"input_ids": ids, "position_ids": position_ids}
    for layout in (HeadTail, Contiguous):
        local, sharded = shard_batch(rows, on_cp, layout, model=model, documents=DOCUMENTS)
        logits = model(local["input_ids"], local["position_ids"], sharded.attn_metadata)
        assert torch.equal(sharded.gather(logits), expected)
