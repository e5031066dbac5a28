"""A parallel Qwen3.5 equals transformers' own, document by document: logits and every gradient."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.testing import assert_close

from dtcp.batch import shard_batch
from dtcp.compile import count_graphs
from dtcp.distributed.ledger import Traffic, count_traffic
from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.models.qwen3_5 import DeltaNetConfig, MoEConfig, Qwen35, Qwen35Config, from_hf
from dtcp.parallelize import (
    ActivationCheckpoint,
    Compile,
    FullCheckpoint,
    NoCheckpoint,
    SelectiveCheckpoint,
    parallelize,
    qwen3_5_plan,
)
from dtcp.recurrent import GatedDeltaCP, GatherStates, RelayoutCP, ScanStates
from dtcp.sequence.document_balanced import DocumentBalanced
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import Contiguous, HeadTail, SequenceLayout
from dtcp.softmax import AllGatherAttention, HybridAttention, RingAttention, UlyssesAttention
from tests.harness import hf_qwen3_5
from tests.harness.parity import GRAPHS, ROWS, SEQ_LEN, gradients
from tests.harness.spmd import run_ranks

DENSE = Qwen35Config(
    vocab_size=64,
    dim=32,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    feed_forward=48,
    delta=DeltaNetConfig(key_heads=2, value_heads=4, key_dim=8, value_dim=16),
    full_attention_every=2,
    rotary_dim=8,
    rope_sections=(2, 1, 1),
)
EXPERTS = replace(
    DENSE,
    # One kv head: tp copies it.
    num_kv_heads=1,
    feed_forward=MoEConfig(8, 2, hidden_dim=24, shared_hidden_dim=16),
)


class Truth(NamedTuple):
    """A step of theirs: weights and gradients under our names."""

    config: Qwen35Config
    weights: dict[str, Tensor]
    input_ids: Tensor
    grad_out: Tensor
    logits: Tensor
    grads: dict[str, Tensor]


def truth_of(config: Qwen35Config) -> Truth:
    model = hf_qwen3_5.build(config)
    torch.manual_seed(1)
    input_ids = torch.randint(config.vocab_size, (len(ROWS), SEQ_LEN))
    real = Documents(ROWS, SEQ_LEN).document() >= 0
    logits = hf_qwen3_5.logits(model, input_ids, ROWS)
    grad_out = torch.randn_like(logits) * real[..., None]
    logits.backward(grad_out)
    weights = from_hf(model.state_dict(), config)
    grads = from_hf({n: p.grad for n, p in model.named_parameters()}, config)
    return Truth(config, weights, input_ids, grad_out, logits.detach(), grads)


@pytest.fixture(scope="module")
def truths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files of what transformers computes, which ranks read."""
    folder = tmp_path_factory.mktemp("truth")
    paths = {"dense": folder / "dense", "experts": folder / "experts"}
    for name, config in (("dense", DENSE), ("experts", EXPERTS)):
        torch.save(truth_of(config), paths[name])
    return paths


class Cell(NamedTuple):
    """A model, a mesh, and the options of one step."""

    model: str
    degrees: Degrees
    layout: type[SequenceLayout] = HeadTail
    states: Any = GatherStates()
    attention: Any = RingAttention()
    checkpoint: ActivationCheckpoint = NoCheckpoint()
    compile: Compile | None = None
    relayout: RelayoutCP | None = None

    def __str__(self) -> str:
        degrees = self.degrees
        mesh = f"dp{degrees.dp_shard}-cp{degrees.cp}-tp{degrees.tp}"
        kinds = (self.layout, type(self.states), type(self.checkpoint))
        options = ["compiled" if self.compile else "eager"] + ["relaid"] * bool(self.relayout)
        return "-".join((self.model, mesh, *(kind.__name__ for kind in kinds), *options))


def step(mesh: Any, path: Path, cell: Cell) -> tuple[Traffic, int, int]:
    """Assert parity on this rank; what one step communicated, graphs and breaks."""
    truth: Truth = torch.load(path, weights_only=False)
    model = Qwen35(truth.config).double()
    model.load_state_dict(truth.weights)
    axes = ParallelMesh.from_degrees(cell.degrees, "cpu")
    delta = GatedDeltaCP(states=cell.states)
    plan = qwen3_5_plan(truth.config, axes, cell.attention, delta=delta, relayout=cell.relayout)
    with count_graphs() as counted:
        parallelize(model, axes, plan, activation_checkpoint=cell.checkpoint, compile=cell.compile)
        traffic = compare(model, axes, truth, cell.layout)
    return traffic, counted.graphs, counted.breaks


def compare(
    model: nn.Module, mesh: ParallelMesh, truth: Truth, layout: type[SequenceLayout]
) -> Traffic:
    mine = slice(mesh.rank("batch"), None, mesh.size("batch"))
    documents = Documents(ROWS[mine], SEQ_LEN)
    batch = {"input_ids": truth.input_ids[mine], "position_ids": documents.position_ids()}
    local, sharded = shard_batch(batch, mesh, layout, model=model, documents=documents)
    grad_out = sharded.shard(truth.grad_out[mine])
    with count_traffic() as traffic:
        logits = model(local["input_ids"], local["position_ids"], sharded.attn_metadata)
        if isinstance(logits, DTensor):
            grad_out = grad_out.chunk(mesh.size("tp"), dim=-1)[mesh.rank("tp")]
            part = logits.to_local(grad_placements=[Shard(2)])
            part.backward(grad_out)
            logits = logits.full_tensor()
        else:
            logits.backward(grad_out)
    real = (documents.document() >= 0)[..., None]
    assert_close(sharded.gather(logits.detach()) * real, truth.logits[mine] * real)
    actual = gradients(model)
    assert actual.keys() == truth.grads.keys()
    for name, grad in actual.items():
        largest = float(truth.grads[name].abs().max())
        assert float((grad - truth.grads[name]).abs().max()) <= 1e-11 * max(1.0, largest), name
    return traffic


SCAN, KEYS = ScanStates(), AllGatherAttention()
CELLS = [
    Cell("dense", Degrees()),
    Cell("experts", Degrees()),
    Cell("dense", Degrees(tp=2)),
    Cell("experts", Degrees(tp=2)),
    Cell("dense", Degrees(cp=2)),
    Cell("dense", Degrees(cp=2), Contiguous, attention=KEYS, checkpoint=FullCheckpoint()),
    Cell("experts", Degrees(cp=3), HeadTail, SCAN),
    Cell("experts", Degrees(cp=3), Contiguous),
    Cell("dense", Degrees(cp=4), Contiguous, SCAN),
    Cell("experts", Degrees(cp=4), HeadTail, attention=HybridAttention(inner_ranks=2)),
    Cell("experts", Degrees(cp=2, tp=2), relayout=RelayoutCP()),
    Cell("dense", Degrees(dp_shard=2, cp=2)),
    Cell("experts", Degrees(dp_shard=2, tp=2)),
    Cell("dense", Degrees(cp=2), checkpoint=SelectiveCheckpoint(), compile=GRAPHS),
    Cell("experts", Degrees(cp=3), Contiguous, SCAN, compile=GRAPHS),
    Cell("experts", Degrees(cp=3), DocumentBalanced),
    Cell("experts", Degrees(cp=2, tp=2), checkpoint=SelectiveCheckpoint(), compile=GRAPHS),
    Cell(
        "dense",
        Degrees(dp_shard=2, cp=2),
        attention=UlyssesAttention(),
        checkpoint=FullCheckpoint(),
        compile=GRAPHS,
        relayout=RelayoutCP(),
    ),
]


# By size: DTensor's caches tell meshes apart only by their ranks, and would give a compiled cell
# a mesh whose groups ended when the pool changed its size in between (torch 2.13).
CELLS.sort(key=lambda cell: cell.degrees.world)


# Compiled and recomputed, with experts, among the fast ones of experts/test_expert_parallel.py.
@pytest.mark.slow_where(lambda cell: cell.compile is not None)
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_qwen3_5_on_ranks_equals_transformers(truths, cell):
    """Compiled, one graph per kind of layer, however many layers there are."""
    again = 2 if isinstance(cell.checkpoint, FullCheckpoint) else 1
    for traffic, graphs, breaks in run_ranks(step, cell.degrees.world, truths[cell.model], cell):
        assert (graphs, breaks) == ((2, 0) if cell.compile else (0, 0))
        assert traffic["dtcp::gated_delta_rule"].calls == 2 * again
        assert traffic["dtcp::gated_delta_rule_backward"].calls == 2
        relayouts = traffic["dtcp::all_to_all"].calls if cell.relayout else 0
        assert relayouts == 2 * bool(cell.relayout) * (2 * again + 2)
