"""Row A9: an argument of another class is refused by name: a class for its instance, True, None."""

import pytest
import torch
from torch import nn

from dtcp import (
    batch_metadata,
    causal_lm_loss,
    global_token_count,
    sequence_layout,
    token_log_probs,
)
from dtcp.batch import shard_batch
from dtcp.compile import EagerIsland
from dtcp.cp_utils import apply_cp, attach_context_parallel_hooks, attach_cp_sdpa_hooks
from dtcp.cp_utils.gemma4 import make_contiguous_shard_cp_batch_and_ctx
from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.linear_logits import LinearLogits
from dtcp.mixer_plan import apply_plan
from dtcp.models.llama import Llama
from dtcp.parallelize import (
    FSDP,
    Compile,
    FullCheckpoint,
    llama_plan,
    load_hf,
    parallelize,
    parallelize_hf,
)
from dtcp.recurrent import GatedDeltaCP, RelayoutCP
from dtcp.recurrent.state_exchange import ScanStates
from dtcp.rows import TokenField
from dtcp.sdpa.frozen import FrozenTarget
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import HeadTail
from dtcp.sequence.masks import Causal
from dtcp.softmax import HaloAttention, RingAttention
from dtcp.softmax.mixer import SoftmaxAttention
from dtcp.sparse import CompressedSparseCP
from dtcp.sparse.mixer import CompressedSparseAttention
from dtcp.sparse_latent import SparseLatentAttention
from tests.harness.parity import CONFIG
from tests.harness.row_ids import of_row

ONE_RANK = ParallelMesh(Degrees(), None, *[None] * 7)
BATCH = {"input_ids": torch.ones(1, 8, dtype=torch.int64)}
WHOLE = Documents.single(1, 8)
LEARNED = torch.tensor(0.5, requires_grad=True)


def parallel(**change):
    model = Llama(CONFIG)
    known = {"mesh": ONE_RANK, "plan": llama_plan(CONFIG, ONE_RANK, RingAttention()), **change}
    return parallelize(known.pop("model", model), **known)


def metadata(**change):
    return batch_metadata(**{"model": nn.Module(), "documents": WHOLE, **change})


CALLS = {
    # Taken for InGraph(): compiled blocks did not break where their owner wanted it.
    "boundary of a class": (lambda: RingAttention(boundary=EagerIsland), "got boundary=<class"),
    "no boundary": (lambda: HaloAttention(3, boundary=None), "got boundary=None"),
    "boundary of sparse": (lambda: CompressedSparseCP(boundary=True), "got boundary=True"),
    "boundary of delta": (lambda: GatedDeltaCP(boundary="island"), "got boundary='island'"),
    "states": (lambda: GatedDeltaCP(ScanStates), "got states=<class"),
    # An op took its number, and its gradient was nobody's.
    "scale": (lambda: SoftmaxAttention(Causal(), scale=LEARNED), "got scale=tensor.*learned"),
    "scale set": (lambda: setattr(SoftmaxAttention(Causal()), "scale", LEARNED), "scale=tensor"),
    "softcap set": (lambda: setattr(SoftmaxAttention(Causal()), "softcap", LEARNED), "softcap=te"),
    "mask set": (lambda: setattr(SoftmaxAttention(Causal()), "mask", Causal), "got mask=<class"),
    "scale of picked": (lambda: SparseLatentAttention(scale=LEARNED), "got scale=tensor"),
    "scale of entries": (
        lambda: CompressedSparseAttention(4, None, scale=LEARNED),
        "got scale=tensor",
    ),
    "scale of a head": (
        lambda: token_log_probs(
            LinearLogits(torch.ones(1, 2, 4), torch.ones(3, 4), scale=LEARNED),
            torch.zeros(1, 2, dtype=torch.int64),
        ),
        "Logits of a head are scaled by one number.*multiply hidden",
    ),
    "inside": (lambda: RelayoutCP(HeadTail(8, 2)), "got inside=HeadTail"),
    "style of a class": (lambda: apply_plan(Llama(CONFIG), None, {"*": RingAttention}), "style=<"),
    "plan": (lambda: apply_plan(Llama(CONFIG), None, None), "got plan=None"),
    "mesh of a plan": (lambda: apply_plan(Llama(CONFIG), 2, {}), "got mesh=2"),
    "model of a plan": (lambda: apply_plan(None, None, {}), "got model=None"),
    "compile": (lambda: parallel(compile=True), "got compile=True"),
    "compile of a class": (lambda: parallel(compile=Compile), "got compile=<class"),
    "fsdp": (lambda: parallel(fsdp=None), "got fsdp=None"),
    "checkpoint": (lambda: parallel(activation_checkpoint=FullCheckpoint), "checkpoint=<class"),
    "mesh": (lambda: parallel(mesh=None), "got mesh=None"),
    "a plan that is a dict": (lambda: parallel(plan={}), r"got plan=\{\}"),
    "model": (lambda: parallel(model=CONFIG), "got model=LlamaConfig"),
    "backend": (lambda: Compile(print), "got backend=<built-in"),
    "mixed precision": (lambda: FSDP(torch.bfloat16), "got mixed_precision=torch.bfloat16"),
    "hf model": (lambda: parallelize_hf("llama", ONE_RANK), "got model='llama'"),
    "strategy of a name": (
        lambda: parallelize_hf(nn.Module(), ONE_RANK, "ring"),
        "attention='ring'",
    ),
    "strategy of a class": (
        lambda: parallelize_hf(nn.Module(), ONE_RANK, RingAttention),
        "got attention=<class",
    ),
    "weights": (lambda: load_hf(nn.Module(), [1], device="cpu"), r"got weights=\[1\]"),
    "degrees": (lambda: ParallelMesh.from_degrees({"cp": 2}, "cpu"), r"got degrees=\{'cp': 2\}"),
    "device mesh": (lambda: ParallelMesh.from_device_mesh(None), "got device_mesh=None"),
    "axis": (lambda: ParallelMesh.of_sequence("cp"), "got axis='cp'"),
    "mesh of a batch": (lambda: shard_batch(BATCH, None), "got mesh=None"),
    "mesh of a count": (
        lambda: global_token_count(BATCH["input_ids"], ONE_RANK),
        "got mesh=ParallelMesh.*: give ParallelMesh.loss",
    ),
    "model of a batch": (lambda: shard_batch(BATCH, ONE_RANK, model=Llama), "got model=<class"),
    "fields": (lambda: shard_batch(BATCH, ONE_RANK, fields=["input_ids"]), "got fields=\\['inp"),
    "balance": (lambda: shard_batch(BATCH, ONE_RANK, balance_for=print), "got balance_for=<"),
    "buckets": (lambda: shard_batch(BATCH, ONE_RANK, buckets=256), "got buckets=256"),
    "field": (lambda: TokenField("1", 0), "got seq_dim='1'"),
    "pad": (lambda: TokenField(1, None), "got pad=None"),
    "model of metadata": (lambda: metadata(model=None), "got model=None"),
    "documents": (lambda: metadata(documents=[[8]]), "got documents of type list"),
    "position_ids": (lambda: metadata(position_ids=3), "got position_ids of type int"),
    "loss": (lambda: causal_lm_loss(None, BATCH, ONE_RANK), "got model=None"),
    "target": (lambda: FrozenTarget(None, None), "got model=None"),
    "capture": (lambda: FrozenTarget(Llama(CONFIG), None, capture="norm"), "got capture='norm'"),
    "layout": (lambda: sequence_layout(HeadTail, None), "got layout=<class"),
    "hooks": (lambda: attach_context_parallel_hooks([]), r"got model=\[\]"),
    "sdpa hooks": (lambda: attach_cp_sdpa_hooks(nn.Module(), 2), "got cp_mesh=2"),
    "apply_cp": (lambda: apply_cp(None, None), "got model=None"),
    "gemma": (lambda: make_contiguous_shard_cp_batch_and_ctx(None, None, None), "batch of type"),
}


@pytest.mark.parametrize("call", CALLS, ids=of_row("A9"))
def test_an_argument_of_another_class_is_refused_by_name(call):
    function, match = CALLS[call]
    with pytest.raises(TypeError, match=match):
        function()


def test_a_mesh_without_ranks_says_what_is_missing_A9():
    with pytest.raises(ValueError, match="no group: call torch"):
        ParallelMesh.from_degrees(Degrees(), "cpu")
