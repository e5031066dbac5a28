"""Places of experts, counted over ranks as on one device."""

import pytest
import torch

from dtcp.batch import shard_batch
from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.huggingface.expert_capacity import PositionInExpert, PositionInExpertCP
from dtcp.mixer_metadata import batch_metadata
from dtcp.mixer_plan import apply_plan
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import Contiguous, HeadTail
from tests.harness.spmd import spmd

LENGTHS = ((7, 11, 4), (20,))
SEQ_LEN, EXPERTS = 24, 3


class Router(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.places = PositionInExpert()


def counted(expert):
    """One token after the other; padding is left out."""
    place = torch.zeros_like(expert)
    for row, lengths in enumerate(LENGTHS):
        first = 0
        for length in lengths:
            seen = [0] * EXPERTS
            for token in range(first, first + length):
                place[row, token] = seen[expert[row, token]]
                seen[expert[row, token]] += 1
            first += length
    return place


@pytest.mark.parametrize("layout", [Contiguous, HeadTail])
@pytest.mark.slow_where(lambda layout, ranks: (layout, ranks) != (HeadTail, 2))
@spmd(ranks=(2, 3))
def test_places_of_experts_are_counted_in_the_order_of_each_document(mesh, ranks, layout):
    generator = torch.Generator().manual_seed(0)
    expert = torch.randint(EXPERTS, (len(LENGTHS), SEQ_LEN), generator=generator)
    documents, router = Documents(LENGTHS, SEQ_LEN), Router()
    real = documents.document() >= 0
    whole = router.places(expert, batch_metadata(router, documents))
    assert torch.equal(whole.where(real, 0), counted(expert))
    on = ParallelMesh.from_degrees(Degrees(cp=ranks), "cpu")
    apply_plan(router, on.cp, {"places": PositionInExpertCP()})
    local, sharded = shard_batch(
        {"input_ids": expert}, on, layout, model=router, documents=documents
    )
    place = router.places(local["input_ids"], sharded.attn_metadata)
    assert torch.equal(sharded.gather(place).where(real, 0), counted(expert))
