"""Unmodified models of transformers on a mesh, held against themselves on one device."""

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F
from torch.testing import assert_close

from dtcp.attention import AllGatherAttention, UlyssesAttention
from dtcp.batch import shift_labels
from dtcp.compile import EagerIsland, count_graphs
from dtcp.documents import Documents
from dtcp.huggingface import documents_of, install_mixers, shard_hf_batch, survey
from dtcp.layout import Contiguous, HeadTail
from dtcp.loss import global_token_count, token_mean_loss
from dtcp.masks import Causal, SlidingWindow
from dtcp.mesh import Degrees, ParallelMesh
from dtcp.traffic import count
from parallelize import Compile, FullCheckpoint, NoCheckpoint, SelectiveCheckpoint, parallelize_hf
from parallelize.huggingface import RING
from tests.hf_models import MODELS, build
from tests.parity import gradients
from tests.spmd import spmd

pytest.importorskip("transformers")

GRAPHS = Compile("aot_eager")
BOUND = 1e-5
"""Relative error: the models' own norms, softmax and rotary tables are fp32 in a model of fp64."""

SEQ_LEN = 48
PACKED = ((20, 9, 19), (48,))
PADDED = ((43,), (48,))


def a_batch(rows: tuple[tuple[int, ...], ...]) -> dict[str, Tensor]:
    """Two rows as a collator of transformers makes them."""
    documents = Documents(rows, SEQ_LEN)
    input_ids = torch.randint(
        1, 64, (len(rows), SEQ_LEN), generator=torch.Generator().manual_seed(3)
    )
    batch = {"input_ids": input_ids, "labels": input_ids.clone()}
    if rows == PADDED:
        filled = (documents.document() >= 0).long()
        return {**batch, "attention_mask": filled, "input_ids": input_ids * filled}
    return {**batch, "position_ids": documents.position_in_document()}


def one_device(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The unmodified model's loss, over the documents' own labels; fills the gradients."""
    inputs = {key: x for key, x in batch.items() if key != "labels"}
    logits = model(**inputs, use_cache=False).logits
    labels = shift_labels(batch["labels"], documents_of(batch))
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    loss.backward()
    return loss.detach()


def on_mesh(
    model: nn.Module, mesh: ParallelMesh, batch: dict[str, Tensor], layout: type = HeadTail
) -> Tensor:
    """The same on a mesh: each batch rank takes its rows, each cp rank its tokens."""
    mine = slice(mesh.rank("batch"), None, mesh.size("batch"))
    rows = {key: x[mine] for key, x in batch.items()}
    local, plan = shard_hf_batch(rows, mesh, layout, model=model)
    labels = local.pop("labels")
    local.pop("padding_mask", None)
    logits = model(**local, tables=plan.tables).logits
    share = token_mean_loss(logits, labels, global_token_count(labels, mesh.loss))
    share.backward()
    loss = share.detach()
    if mesh.loss is not None:
        dist.all_reduce(loss, group=mesh.loss.get_group())
    return loss


def assert_parity(kind, degrees, *, rows=PACKED, layout=HeadTail, attention=RING, **options):
    """Assert that loss and all gradients are those of the unmodified model, on one device."""
    reference, model = build(kind), build(kind)
    mesh = ParallelMesh.from_degrees(degrees, "cpu")
    parallelize_hf(model, mesh, attention, **options)
    batch = a_batch(rows)
    expected = one_device(reference, batch)
    with count() as traffic:
        actual = on_mesh(model, mesh, batch, layout)
    assert_close(actual, expected, rtol=BOUND, atol=0.0)
    wanted, found = gradients(reference), gradients(model)
    assert wanted.keys() == found.keys()
    worst = {
        name: error
        for name, grad in wanted.items()
        if not (error := float((found[name] - grad).abs().max() / grad.abs().max())) <= BOUND
    }
    assert not worst, worst
    return traffic


@pytest.mark.parametrize("rows", [PACKED, PADDED], ids=["packed", "padded"])
@pytest.mark.parametrize("kind", MODELS)
@spmd(ranks=(1, 2))
def test_model_equals_itself_unmodified_on_one_device(mesh, ranks, kind, rows):
    traffic = assert_parity(kind, Degrees(cp=ranks), rows=rows)
    assert (traffic.received > 0) == (ranks > 1)
