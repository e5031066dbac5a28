"""How long a block takes to compile with context parallelism, beside the same block without."""

import statistics
import time
import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor.parallel import parallelize_module

from dtcp.batch import shard_batch
from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.mixer_metadata import batch_metadata
from dtcp.models.llama import tiny
from dtcp.models.llama.model import Block
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import HeadTail
from dtcp.softmax import RingAttention

REPEATS = 3


def compile_line() -> str:
    """One sentence: seconds to compile a block, both ways, one rank of one, cold each time."""
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    plain, parallel = [], []
    _compile_block(context_parallel=False)  # the first compile also loads the compiler
    for _ in range(REPEATS):
        plain.append(_compile_block(context_parallel=False))
        parallel.append(_compile_block(context_parallel=True))
    dist.destroy_process_group()
    without, with_cp = statistics.median(plain), statistics.median(parallel)
    return (
        f"Compiling a Llama block, forward and backward, inductor, cold: {without:.1f} s without, "
        f"{with_cp:.1f} s with ring attention: {with_cp / without:.2f}x (median of {REPEATS})."
    )


def _compile_block(*, context_parallel: bool) -> float:
    torch._dynamo.reset()
    config = tiny()
    block = nn.Sequential(Block(config))
    documents = Documents.single(1, 64)
    attn_metadata = batch_metadata(block, documents)
    if context_parallel:
        mesh = ParallelMesh.from_degrees(Degrees(), "cpu")
        # A plan on one rank is a no-op; torch's own function applies the style all the same.
        axis = mesh.device_mesh["cp"]
        parallelize_module(block, axis, {"0.attention.mixer": RingAttention()})
        ids = torch.zeros(1, 64, dtype=torch.int64)
        _, plan = shard_batch({"input_ids": ids}, mesh, HeadTail, model=block)
        attn_metadata = plan.attn_metadata
    x = torch.randn(1, 64, config.dim, requires_grad=True)
    position_ids = torch.arange(64)[None]
    with torch._inductor.config.patch(force_disable_caches=True), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="dynamo_pgo")  # another cache that is not read
        start = time.perf_counter()
        compiled = torch.compile(block[0], fullgraph=True)
        compiled(x, position_ids, attn_metadata).sum().backward()
        return time.perf_counter() - start
