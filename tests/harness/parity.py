"""One step of a tiny decoder over packed rows, on one device and on a mesh, and how all compare."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from dtcp.batch import shard_batch
from dtcp.distributed.mesh import ParallelMesh
from dtcp.labels import shift_labels
from dtcp.loss import global_token_count, token_mean_loss
from dtcp.mixer_metadata import batch_metadata
from dtcp.models.llama import Llama, LlamaConfig
from dtcp.parallelize import Compile
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import SequenceLayout

GRAPHS = Compile("aot_eager")
Rows = tuple[tuple[int, ...], ...]

CONFIG = LlamaConfig(
    vocab_size=64,
    dim=32,
    hidden_dim=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    qkv_bias=True,
    qk_norm=True,
)
SEQ_LEN = 32
ROWS = ((9, 16, 6), (32,), (1, 20, 11), (5, 5, 5))
"""Documents of four rows: some cut by every shard border, two rows with padding."""


def one_device(model: Llama, rows: Rows, input_ids: Tensor | None = None) -> Tensor:
    """The loss of all rows on one device, by torch's own cross-entropy; fills the gradients.

    Args:
        input_ids: [B, S], drawn where they are not given.
    """
    documents = Documents(rows, SEQ_LEN)
    if input_ids is None:
        input_ids = torch.randint(CONFIG.vocab_size, (len(rows), SEQ_LEN))
    labels = shift_labels(input_ids, documents)
    position_ids, attn_metadata = documents.position_ids(), batch_metadata(model, documents)
    logits = model(input_ids, position_ids, attn_metadata)
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    loss.backward()
    return loss.detach()


def on_mesh(
    model: nn.Module, mesh: ParallelMesh, rows: Rows, layout: type[SequenceLayout]
) -> Tensor:
    """The same on a mesh: each batch rank takes its rows, each cp rank its tokens."""
    whole = Documents(rows, SEQ_LEN)
    input_ids = torch.randint(CONFIG.vocab_size, (len(rows), SEQ_LEN))
    batch = {
        "input_ids": input_ids,
        "labels": shift_labels(input_ids, whole),
        "position_ids": whole.position_ids(),
    }
    mine = slice(mesh.rank("batch"), None, mesh.size("batch"))
    local, sharded = shard_batch(
        {key: x[mine] for key, x in batch.items()},
        mesh,
        layout,
        model=model,
        documents=Documents(rows[mine], SEQ_LEN),
    )
    tokens = global_token_count(local["labels"], mesh.loss)
    logits = model(local["input_ids"], local["position_ids"], sharded.attn_metadata)
    share = token_mean_loss(logits, local["labels"], tokens)
    share.backward()
    return summed(share, mesh)


def summed(share: Tensor, mesh: ParallelMesh) -> Tensor:
    """The loss of all ranks, of which this one has a share."""
    loss = share.detach().clone()
    if mesh.loss is not None:
        dist.all_reduce(loss, group=mesh.loss.get_group())
    return loss


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Every gradient there is, whole."""
    return {
        name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        for name, p in model.named_parameters()
        if p.grad is not None
    }


def assert_gradients(
    model: nn.Module, expected: Mapping[str, Tensor], bound: float, *, floor: float = 0.0
) -> None:
    """Assert that a model has these gradients, each to within a part of its largest number.

    Args:
        floor: what part of the largest number of all counts as the largest of each, at least.
    """
    actual = gradients(model)
    assert actual.keys() == expected.keys()
    largest = {name: float(grad.abs().max()) for name, grad in expected.items()}
    least = floor * max(largest.values())
    worst = {
        name: error
        for name, grad in expected.items()
        # Gate and up have a dim of their own where tp splits experts.
        if not (error := float((actual[name].reshape(grad.shape) - grad).abs().max()))
        <= bound * max(largest[name], least)
    }
    assert not worst, (worst, largest)
