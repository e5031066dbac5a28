"""DeepSeek-V4 on a mesh equals the published model, document by document, on one device.

The published model runs in the parent alone: ranks read weights, logits, loss and gradients from
a file, so they need not import transformers.
"""

import functools
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.testing import assert_close

from dtcp.batch import shard_batch
from dtcp.compile import count_graphs
from dtcp.distributed.ledger import count_traffic
from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.labels import look_ahead, shift_labels
from dtcp.loss import global_token_count, mtp_loss, token_mean_loss
from dtcp.models.deepseek_v4 import DeepseekV4, TopKRouter, config_from_hf, from_hf, tiny
from dtcp.parallelize import (
    ActivationCheckpoint,
    Compile,
    FullCheckpoint,
    NoCheckpoint,
    SelectiveCheckpoint,
    balance_experts,
    deepseek_v4_plan,
    parallelize,
)
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import Contiguous, HeadTail, SequenceLayout
from tests.harness import hf_deepseek_v4 as published
from tests.harness.parity import GRAPHS, gradients, summed
from tests.harness.spmd import run_ranks, spmd

SEQ_LEN = 96
ROWS = ((37, 3, 49), (70, 26))
"""Unaligned with windows and shards; one shorter than a window; padding in a row."""
KEEP_ALL = NoCheckpoint()


TWO_LAYERS = {
    "num_hidden_layers": 2,
    "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention"],
    "num_hash_layers": 1,
    "n_routed_experts": 4,
    "hc_mult": 2,
    "hc_sinkhorn_iters": 2,
}
"""Compiles in a third of the time and has every kind of layer but that of the window alone."""


@functools.cache
def truth(*, small: bool = False) -> str:
    """A file of the published model's weights and results, in fp64."""
    theirs = published.build(**(TWO_LAYERS if small else {}))
    settings = theirs.config.to_dict()
    config, documents = config_from_hf(settings), Documents(ROWS, SEQ_LEN)
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(config.vocab_size, (len(ROWS), SEQ_LEN), generator=generator)
    labels = shift_labels(input_ids, documents)
    logits = published.one_by_one(theirs, input_ids, documents)
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    loss.backward()
    grads = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    path = Path(tempfile.mkdtemp()) / "published.pt"
    expected: dict[str, Any] = {
        "settings": settings,
        "weights": from_hf(theirs.state_dict(), config),
        "input_ids": input_ids,
        "labels": labels,
        "logits": logits.detach(),
        "loss": loss.detach(),
        "gradients": {name: x.clone() for name, x in from_hf(grads, config).items()},
    }
    torch.save(expected, path)
    return str(path)


def step(
    model: nn.Module, mesh: ParallelMesh, layout: type[SequenceLayout], expected: dict[str, Any]
) -> Tensor:
    """One step on the mesh; checks this rank's logits and returns the loss of all ranks."""
    whole = Documents(ROWS, SEQ_LEN)
    mine = slice(mesh.rank("batch"), None, mesh.size("batch"))
    batch = {
        "input_ids": expected["input_ids"][mine],
        "labels": expected["labels"][mine],
        "position_ids": whole.position_ids()[mine],
    }
    documents = Documents(ROWS[mine], SEQ_LEN)
    local, sharded = shard_batch(batch, mesh, layout, model=model, documents=documents)
    tokens = global_token_count(local["labels"], mesh.loss)
    logits = model(local["input_ids"], local["position_ids"], sharded.attn_metadata)
    share = token_mean_loss(logits, local["labels"], tokens)
    share.backward()

    local_logits = logits.full_tensor() if isinstance(logits, DTensor) else logits
    real = sharded.shard((documents.document() >= 0)[..., None])
    assert_close(local_logits * real, sharded.shard(expected["logits"][mine]))
    return summed(share, mesh)


def check(
    mesh: DeviceMesh,
    path: str,
    degrees: Degrees,
    layout: type[SequenceLayout],
    checkpoint: ActivationCheckpoint,
    compile: Compile | None,
    op: str,
) -> tuple[int, int, int]:
    """Logits, loss and every gradient on this rank; (graphs, breaks, calls of an op)."""
    expected = torch.load(path, weights_only=False)
    config = config_from_hf(expected["settings"])
    model = DeepseekV4(config).double()
    model.load_state_dict(expected["weights"])
    whole = ParallelMesh.from_degrees(degrees, "cpu")
    plan = deepseek_v4_plan(config, whole)
    parallelize(model, whole, plan, activation_checkpoint=checkpoint, compile=compile)
    with count_graphs() as graphs, count_traffic() as traffic:
        loss = step(model, whole, layout, expected)
    assert_close(loss, expected["loss"])
    actual = {name: x for name, x in gradients(model).items() if x is not None}
    assert_close(actual, expected["gradients"])
    assert not any(".indexer." in name for name in actual)
    return graphs.graphs, graphs.breaks, traffic[op].calls


def run(
    degrees: Degrees,
    layout: type[SequenceLayout] = HeadTail,
    checkpoint: ActivationCheckpoint = KEEP_ALL,
    compile: Compile | None = None,
    op: str = "dtcp::sparse_attention",
) -> tuple[int, int, int]:
    ranks = degrees.world
    path = truth(small=compile is not None)
    results = run_ranks(check, ranks, path, degrees, layout, checkpoint, compile, op)
    assert len(set(results)) == 1
    return results[0]


def name_of(value: object) -> str:
    """A test's name: the axes of more than one rank, and the layout's."""
    if isinstance(value, Degrees):
        axes = asdict(value).items()
        return "x".join(f"{axis}{degree}" for axis, degree in axes if degree > 1)
    return value.__name__ if isinstance(value, type) else type(value).__name__


EAGER = [
    *((Degrees(cp=n), layout) for n in (2, 3, 4) for layout in (Contiguous, HeadTail)),
    (Degrees(tp=2), Contiguous),
    (Degrees(dp_shard=2), Contiguous),
    (Degrees(cp=2, tp=2), HeadTail),
    (Degrees(dp_shard=2, cp=2), Contiguous),
]


@pytest.mark.slow_where(
    lambda degrees, layout: (degrees.cp, layout) in ((3, Contiguous), (4, HeadTail))
)
@pytest.mark.parametrize(("degrees", "layout"), EAGER, ids=name_of)
def test_deepseek_v4_on_a_mesh_equals_the_published_model(degrees, layout):
    assert run(degrees, layout) == (0, 0, 4)


@pytest.mark.parametrize("checkpoint", [FullCheckpoint(), SelectiveCheckpoint()])
def test_deepseek_v4_checkpointed_equals_the_published_model(checkpoint):
    """Attention reads what was exchanged before: it runs again, the exchange only in full."""
    exchanged = 8 if isinstance(checkpoint, FullCheckpoint) else 4
    counts = run(Degrees(cp=2), checkpoint=checkpoint, op="dtcp::bring_left")
    assert counts == (0, 0, exchanged)


COMPILED = [
    (Degrees(cp=2), HeadTail, KEEP_ALL),
    pytest.param(*(Degrees(cp=2, tp=2), Contiguous, SelectiveCheckpoint()), marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("degrees", "layout", "checkpoint"), COMPILED, ids=name_of)
def test_deepseek_v4_compiled_equals_the_published_model(degrees, layout, checkpoint):
    """A graph for each kind of layer."""
    assert run(degrees, layout, checkpoint, GRAPHS, op="dtcp::bring_left") == (2, 0, 2)


@functools.cache
def truth_ahead() -> str:
    """A file of the published parts with one depth of multi-token prediction, by document."""
    layers = ["compressed_sparse_attention", "sliding_attention"]
    theirs = published.build(num_hidden_layers=2, layer_types=layers, num_hash_layers=1)
    settings = theirs.config.to_dict()
    both = published.WithPrediction(theirs)
    settings |= {"num_hidden_layers": 1, "num_nextn_predict_layers": 1}
    settings |= {"compress_ratios": [4, 0], "mlp_layer_types": ["hash_moe"]}
    config = config_from_hf(settings)
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(config.vocab_size, (len(ROWS), SEQ_LEN), generator=generator)
    losses, counts = torch.zeros(2, dtype=torch.float64), 0
    with published.in_fp64():
        for row, lengths in zip(input_ids, ROWS, strict=True):
            for ids in row[: sum(lengths)].split(lengths):
                both_logits = both(ids[None])
                counts += len(ids) - 1
                # The token after the next one: shifted by two, if the document goes that far.
                parts = [
                    F.cross_entropy(logits[0, :-shift], ids[shift:], reduction="sum")
                    for shift, logits in enumerate(both_logits, start=1)
                ]
                losses = losses + torch.stack(parts)
    loss = (losses[0] + 0.3 * losses[1]) / counts
    loss.backward()
    grads = {name: p.grad for name, p in both.named_parameters() if p.grad is not None}
    path = Path(tempfile.mkdtemp()) / "ahead.pt"
    expected = {
        "settings": settings,
        "weights": published.in_our_names(dict(both.state_dict()), config, 1),
        "input_ids": input_ids,
        "loss": loss.detach(),
        "gradients": {n: x.clone() for n, x in published.in_our_names(grads, config, 1).items()},
    }
    torch.save(expected, path)
    return str(path)


def check_ahead(
    mesh: DeviceMesh, path: str, degrees: Degrees, layout: type[SequenceLayout]
) -> None:
    """Loss of both tokens and every gradient on this rank."""
    expected = torch.load(path, weights_only=False)
    config = config_from_hf(expected["settings"])
    model = DeepseekV4(config).double()
    model.load_state_dict(expected["weights"])
    whole = ParallelMesh.from_degrees(degrees, "cpu")
    parallelize(model, whole, deepseek_v4_plan(config, whole))

    documents, input_ids = Documents(ROWS, SEQ_LEN), expected["input_ids"]
    labels = shift_labels(input_ids, documents)
    batch = {
        "input_ids": input_ids,
        "labels": labels,
        "position_ids": documents.position_ids(),
        **look_ahead(input_ids, labels, documents, depths=1),
    }
    local, sharded = shard_batch(batch, whole, layout, model=model, documents=documents)
    tokens = global_token_count(local["labels"], whole.loss)
    reads = (
        local["input_ids"],
        local["position_ids"],
        sharded.attn_metadata,
        local["mtp_input_ids"],
    )
    logits = model(*reads)
    share = mtp_loss(logits, local["labels"], local["mtp_labels"], tokens, weight=0.3)
    share.backward()
    assert_close(summed(share, whole), expected["loss"])
    actual = {name: x for name, x in gradients(model).items() if x is not None}
    assert_close(actual, expected["gradients"])


@pytest.mark.parametrize(
    ("degrees", "layout"),
    [(Degrees(cp=4), Contiguous), (Degrees(cp=2, tp=2), HeadTail)],
    ids=name_of,
)
def test_deepseek_v4_predicts_further_ahead_as_the_published_parts_do(degrees, layout):
    """The next token is on another rank, or in another document: shifted before sharding."""
    run_ranks(check_ahead, degrees.world, truth_ahead(), degrees, layout)


@spmd(ranks=2)
def test_deepseek_v4_routers_are_balanced_by_the_loads_of_all_ranks(mesh):
    """Each rank moves every bias in the same way, by the tokens of both."""
    config = tiny(64)
    model = DeepseekV4(config)
    routers = [m for m in model.modules() if isinstance(m, TopKRouter)]
    for router in routers:
        router.load[mesh.get_local_rank()] = 4.0
    balance_experts(model, mesh, speed=0.5)
    for router in routers:
        assert router.bias.tolist() == [-0.5, -0.5, *[0.5] * 6]
        assert not router.load.any()


def test_deepseek_v4_without_a_router_that_learns_has_nothing_to_balance():
    """A pipeline stage of layers that look experts up by token."""
    stage = DeepseekV4(tiny(64)).layers[:1]
    assert not any(isinstance(x, TopKRouter) for x in stage.modules())
    balance_experts(stage, None)


@spmd(ranks=2)
def test_deepseek_v4_refuses_a_tp_that_does_not_divide(mesh):
    config, whole = tiny(64), ParallelMesh.from_degrees(Degrees(tp=2), "cpu")
    for change in ({"num_heads": 3, "output_groups": 3}, {"output_groups": 1}):
        with pytest.raises(ValueError, match="into equal parts, got"):
            deepseek_v4_plan(replace(config, **change), whole)
