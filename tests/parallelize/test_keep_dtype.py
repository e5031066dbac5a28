"""keep_dtype: parameters that mixed precision leaves as they are, wherever they are in a model.

The truth is one device that computes with its other parameters rounded, or widened, by hand.
"""

import tempfile
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from dtcp.batch import shard_batch
from dtcp.compile import count_graphs
from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.labels import shift_labels
from dtcp.loss import global_token_count, token_mean_loss
from dtcp.mixer_metadata import batch_metadata
from dtcp.models import deepseek_v4, gemma4, qwen3_5
from dtcp.parallelize import (
    FSDP,
    FullCheckpoint,
    NoCheckpoint,
    SelectiveCheckpoint,
    deepseek_v4_plan,
    gemma4_plan,
    parallelize,
    qwen3_5_plan,
)
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import Contiguous, HeadTail
from dtcp.softmax import RingAttention
from tests.harness.parity import GRAPHS, gradients
from tests.harness.spmd import spmd

SEQ_LEN = 48
ROWS = ((19, 3, 26), (30, 11), (48,), (7, 9))
NARROW = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
WIDE = MixedPrecisionPolicy(param_dtype=torch.float64)
"""Other parameters are wider than those kept, so that every sum over ranks shows in fp32."""

STREAMS = {"dim": 32, "hidden_dim": 32, "streams": 2, "sinkhorn_steps": 2, "num_selected": 4}
DEEPSEEK = replace(
    deepseek_v4.tiny(64), num_layers=2, num_mtp_layers=0, compress_ratios=(4, 16), **STREAMS
)
QWEN = replace(qwen3_5.tiny(64), num_layers=2, full_attention_every=2, dim=32, feed_forward=48)
GEMMA = gemma4.tiny_e(64)
FAMILIES: dict[str, tuple[type[nn.Module], Any, Any]] = {
    "deepseek_v4": (deepseek_v4.DeepseekV4, DEEPSEEK, deepseek_v4_plan),
    "qwen3_5": (qwen3_5.Qwen35, QWEN, partial(qwen3_5_plan, attention=RingAttention())),
    "gemma4": (gemma4.Gemma4, GEMMA, partial(gemma4_plan, attention=RingAttention())),
}
ROUNDED = ("_proj.weight", "experts", "router", "shared", "embedding", "lm_head")
"""What DeepSeek-V4 does not keep, by parts of names; transformers' list is held to the
plan's in tests/models/test_deepseek_v4.py."""


def keeps_dtype(family: str, name: str) -> bool:
    if family == "gemma4":
        return False
    if family == "qwen3_5":
        return name.endswith((".log_rate.weight", ".step_bias.weight"))
    return not any(part in name for part in ROUNDED)


def a_pair(family: str, degrees: Degrees, policy: MixedPrecisionPolicy, **options: Any):
    """A model whose kept parameters hold what bf16 cannot; the same parallel; its mesh."""
    mesh = ParallelMesh.from_degrees(degrees, "cpu")
    make, config, plan_of = FAMILIES[family]
    plan = plan_of(config, mesh)
    torch.manual_seed(0)
    reference, model = make(config), make(config)
    reference.init_weights()
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if keeps_dtype(family, name):
                parameter.add_(torch.rand_like(parameter).clamp(min=2**-12) / 2)
                assert (parameter != parameter.bfloat16()).any(), name
    model.load_state_dict(reference.state_dict())
    parallelize(model, mesh, plan, fsdp=FSDP(mixed_precision=policy), **options)
    for name, parameter in reference.named_parameters():
        if not keeps_dtype(family, name):
            parameter.data = parameter.data.to(policy.param_dtype)
    return reference, model, mesh


def tokens_of(rows: slice) -> tuple[Documents, dict[str, Tensor]]:
    """Some rows of the batch."""
    whole, generator = Documents(ROWS, SEQ_LEN), torch.Generator().manual_seed(1)
    input_ids = torch.randint(64, (len(ROWS), SEQ_LEN), generator=generator)
    batch = {
        "input_ids": input_ids,
        "labels": shift_labels(input_ids, whole),
        "position_ids": whole.position_ids(),
    }
    return Documents(ROWS[rows], SEQ_LEN), {key: x[rows] for key, x in batch.items()}


def on_one_device(model: nn.Module, rows: slice) -> Tensor:
    """Logits of some rows; gradients are of the mean over the tokens of all."""
    documents, batch = tokens_of(rows)
    tokens = (tokens_of(slice(None))[1]["labels"] >= 0).sum()
    logits = model(batch["input_ids"], batch["position_ids"], batch_metadata(model, documents))
    token_mean_loss(logits, batch["labels"], tokens).backward()
    return logits.detach()


def on_mesh(model: nn.Module, mesh: ParallelMesh, layout: Any) -> Tensor:
    documents, batch = tokens_of(slice(mesh.rank("batch"), None, mesh.size("batch")))
    local, sharded = shard_batch(batch, mesh, layout, model=model, documents=documents)
    logits = model(local["input_ids"], local["position_ids"], sharded.attn_metadata)
    tokens = global_token_count(local["labels"], mesh.loss)
    token_mean_loss(logits, local["labels"], tokens).backward()
    return (logits.full_tensor() if isinstance(logits, DTensor) else logits).detach()


class Received(TorchDispatchMode):
    """Bytes of each dtype that FSDP received, this rank's own part not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.gathered: dict[torch.dtype, int] = {}
        self.reduced: dict[torch.dtype, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for name, received in (
            ("_allgather_base_", self.gathered),
            ("_reduce_scatter_base_", self.reduced),
        ):
            if func is getattr(torch.ops.c10d, name).default:
                moved = abs(args[0].nbytes - args[1].nbytes)
                received[args[0].dtype] = received.get(args[0].dtype, 0) + moved
        return func(*args, **(kwargs or {}))


def padded_bytes(parameter: nn.Parameter, ranks: int) -> int:
    """One rank's part of a whole fp32 parameter, of which FSDP gives each as many rows."""
    return -(-parameter.shape[0] // ranks) * parameter[0].numel() * 4


@pytest.mark.parametrize("family", list(FAMILIES))
@spmd(ranks=2)
def test_kept_parameters_are_neither_rounded_nor_reduced_in_bf16(mesh, family):
    """Logits to the last bit, and gradients, of one device; bytes as many as the parameters have.

    The angles of positions, too, which Qwen3.5 hands to its blocks, stay in fp32. Gemma 4 keeps
    no parameter, as published; its streams stay in bf16 although its layers' scalars do not.
    """
    reference, model, mesh = a_pair(family, Degrees(dp_shard=2), NARROW)
    with Received() as received:
        logits = on_mesh(model, mesh, Contiguous)
    mine = slice(mesh.rank("batch"), None, mesh.size("batch"))
    assert torch.equal(logits, on_one_device(reference, mine))

    kept = {n: p for n, p in reference.named_parameters() if keeps_dtype(family, n)}
    actual = gradients(model)
    trained = {name: p.grad for name, p in kept.items() if p.grad is not None}
    for name, grad in trained.items():
        dist.all_reduce(grad)
        assert actual[name].dtype == torch.float32
        assert_close(actual[name], grad, msg=lambda text, name=name: f"{name}: {text}")

    # A block is gathered again for its backward pass, and so is all but the last unit.
    parts = {name: padded_bytes(p, 2) for name, p in kept.items()}
    twice = sum(size for name, size in parts.items() if name.startswith("layers."))
    reduced = sum(parts[name] for name in trained)
    assert received.gathered.pop(torch.float32, 0) == sum(parts.values()) + twice
    assert received.reduced.pop(torch.float32, 0) == reduced
    assert set(received.gathered) == set(received.reduced) == {torch.bfloat16}


KEEP_ALL, FULL, SELECTIVE = NoCheckpoint(), FullCheckpoint(), SelectiveCheckpoint()


@pytest.mark.parametrize(
    ("family", "degrees", "layout", "checkpoint", "compile"),
    [
        ("deepseek_v4", Degrees(dp_shard=2, cp=2), Contiguous, FULL, None),
        pytest.param(
            *("deepseek_v4", Degrees(cp=2, tp=2), HeadTail, SELECTIVE, None), marks=pytest.mark.slow
        ),
        ("deepseek_v4", Degrees(dp_replicate=2, dp_shard=2), Contiguous, KEEP_ALL, None),
        pytest.param(
            *("qwen3_5", Degrees(cp=2, tp=2), HeadTail, FULL, GRAPHS), marks=pytest.mark.slow
        ),
    ],
)
@spmd(ranks=4)
def test_gradients_of_kept_parameters_equal_one_device_on_every_mesh(
    mesh, family, degrees, layout, checkpoint, compile
):
    """After two passes, of which one is reduced; blocks stay one graph each, and gradients have
    a common norm."""
    options = {"activation_checkpoint": checkpoint, "compile": compile}
    reference, model, mesh = a_pair(family, degrees, WIDE, **options)
    assert len({p.device_mesh for p in model.parameters()}) == 1
    on_one_device(reference, slice(None))
    with count_graphs() as graphs:
        for reduced in (False, True):
            model.set_requires_gradient_sync(reduced)
            on_mesh(model, mesh, layout)
    for parameter in reference.parameters():
        if parameter.grad is not None:
            parameter.grad *= 2
    assert (graphs.graphs, graphs.breaks) == (2 if compile else 0, 0)
    actual = {name: x for name, x in gradients(model).items() if x is not None}
    assert_close(
        actual, {n: p.grad.float() for n, p in reference.named_parameters() if n in actual}
    )
    norms = [nn.utils.clip_grad_norm_(m.parameters(), 0.1) for m in (model, reference)]
    assert_close(norms[0].full_tensor(), norms[1].float())


@spmd(ranks=2)
def test_units_stay_whole_where_nothing_is_rounded(mesh):
    """No mixed precision, or one that changes no dtype: one gather per unit, as before."""
    for policy in (
        MixedPrecisionPolicy(),
        MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32),
    ):
        with_plan = ParallelMesh.from_degrees(Degrees(dp_shard=2), "cpu")
        calls = []
        for names in ((), deepseek_v4_plan(DEEPSEEK, with_plan).keep_dtype):
            plan = replace(deepseek_v4_plan(DEEPSEEK, with_plan), keep_dtype=names)
            model = deepseek_v4.DeepseekV4(DEEPSEEK)
            parallelize(model, with_plan, plan, fsdp=FSDP(mixed_precision=policy))
            with Received() as received:
                on_mesh(model, with_plan, Contiguous)
            calls.append((received.gathered, received.reduced))
        assert calls[0] == calls[1]


@spmd(ranks=2)
def test_a_state_with_kept_parameters_resumes_on_another_mesh(mesh):
    """Saved after a step on two ranks of FSDP in bf16; loaded on tp, and on one device."""
    with tempfile.TemporaryDirectory() as folder:
        shared = [folder]
        dist.broadcast_object_list(shared)
        saved = None
        for degrees in (Degrees(dp_shard=2), Degrees(tp=2), Degrees()):
            if degrees == Degrees():
                model: nn.Module = qwen3_5.Qwen35(QWEN)
            else:
                _, model, own = a_pair("qwen3_5", degrees, NARROW)
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
            if saved is None:
                on_mesh(model, own, Contiguous)
                optimizer.step()
            states = get_state_dict(model, optimizer)
            state = {"model": states[0], "optimizer": states[1]}
            if saved is None:
                dcp.save(state, checkpoint_id=shared[0])
                saved = whole_of(states)
            else:
                dcp.load(state, checkpoint_id=shared[0])
                assert_close(whole_of(states), saved, rtol=0, atol=0)
        dist.barrier()


def whole_of(states: Any) -> dict[str, Tensor]:
    """Parameters and the moments of the optimizer, whole."""
    tensors = dict(states[0])
    for name, moments in states[1]["state"].items():
        tensors |= {f"{name} {key}": x for key, x in moments.items()}
    return {n: x.full_tensor() if isinstance(x, DTensor) else x.clone() for n, x in tensors.items()}
