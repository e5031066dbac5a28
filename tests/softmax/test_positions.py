"""Mixers that rotate what they bring: by the positions of the batch, whatever these count.

That other positions than a document's 0, 1, 2, .. are exact is in the models' own tests, whose
truth is given them too (tests/harness/hf_gemma4.py).
"""

import pytest
import torch
from torch import nn

from benchmarks.published_sparse import PublishedSparseCP
from dtcp.batch import shard_batch
from dtcp.compile import EagerIsland
from dtcp.distributed.mesh import ParallelMesh
from dtcp.mixer_metadata import batch_metadata
from dtcp.mixer_plan import apply_plan
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import Contiguous, HeadTail
from dtcp.sequence.masks import Causal
from dtcp.softmax import AllGatherAttention, RingAttention, SharedKVAttention
from dtcp.softmax.mixer import GatherSharedKV, KeysFromValues
from dtcp.sparse import CompressedSparseCP
from dtcp.sparse.mixer import CompressedSparseAttention, Compression
from tests.harness.attention_parity import refused
from tests.harness.spmd import spmd

SEQ_LEN = 32
WHOLE = Documents(((11, 21),), SEQ_LEN)
FREQUENCY = torch.tensor([1.0, 0.1])
OTHERS = "position_ids are those of its batch"


def rotated(mixer, position_ids, attn_metadata):
    """Whatever of a mixer reads positions."""
    if isinstance(mixer, KeysFromValues):
        x = torch.ones(*position_ids.shape[-2:], 2, 4)
        return mixer(x, x, position_ids, torch.ones(4), FREQUENCY, attn_metadata)
    if isinstance(mixer, GatherSharedKV):
        return mixer.position_ids(position_ids, attn_metadata)
    return mixer.check_position_ids(position_ids, attn_metadata)


def sparse():
    return CompressedSparseAttention(4, Compression(4), scale=1.0)


STYLES = [
    (lambda: KeysFromValues(Causal()), RingAttention(), HeadTail),
    (lambda: KeysFromValues(Causal()), AllGatherAttention(boundary=EagerIsland()), Contiguous),
    (lambda: GatherSharedKV(Causal()), SharedKVAttention(), HeadTail),
    (sparse, CompressedSparseCP(), HeadTail),
    (sparse, PublishedSparseCP(), Contiguous),
]


@spmd(ranks=2)
def test_positions_of_another_batch_stop_every_rank(mesh):
    """A shard's own 0, 1, 2, .. is what forgets that there are other shards."""
    for make, style, layout in STYLES:
        mixer = make()
        apply_plan(nn.ModuleList([mixer]), mesh, {"0": style})
        own = WHOLE.position_ids()
        batch = {"input_ids": torch.zeros_like(own), "position_ids": own}
        ranks = ParallelMesh.of_sequence(mesh)
        local, sharded = shard_batch(batch, ranks, layout, model=mixer, documents=WHOLE)
        rotated(mixer, local["position_ids"], sharded.attn_metadata)
        shard = torch.arange(SEQ_LEN // 2)[None]
        for position_ids in (shard, shard + 1):
            with pytest.raises(ValueError, match=OTHERS):
                rotated(mixer, position_ids, sharded.attn_metadata)
        several = local["position_ids"].expand(3, 1, -1)
        refused("one position per token", lambda: rotated(mixer, several, sharded.attn_metadata))  # noqa: B023
        batch["position_ids"] = own.expand(3, 1, -1)
        refused(
            "one position per token",
            lambda: shard_batch(batch, ranks, layout, model=mixer, documents=WHOLE),  # noqa: B023
        )


def test_position_ids_on_one_device_are_those_of_the_metadata():
    model, own = nn.ModuleList([KeysFromValues(Causal())]), WHOLE.position_ids()
    attn_metadata = batch_metadata(model, WHOLE, position_ids=3 * own)
    rotated(model[0], 3 * own, attn_metadata)
    with pytest.raises(ValueError, match=OTHERS):
        rotated(model[0], own, attn_metadata)


def test_entries_have_no_position_but_their_place():
    position_ids = WHOLE.position_ids() + 2
    with pytest.raises(ValueError, match=r"got position_ids\[0, 0\]=2 for token 0 of its document"):
        batch_metadata(nn.ModuleList([sparse()]), WHOLE, position_ids=position_ids)
