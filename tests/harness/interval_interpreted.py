"""Run attention's kernels in Triton's interpreter against the reference, for test_interval.py.

Triton reads TRITON_INTERPRET when it is imported, so this script runs in processes of its own:
two, which share the cases and then become the ranks of a ring. No kernel is replaced: where
Triton interprets, attention of CPU tensors in fp32 and fp16 runs on Triton's kernels
(triton_support.triton_runs_on).

Prints the largest error of each result, divided by its largest value.
"""

import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from dtcp.kernels.softmax.triton import bias, ranges
from dtcp.kernels.softmax.triton.attention import TritonAttention
from dtcp.kernels.softmax.types import (
    GradAccumulators,
    Keys,
    OnlineSoftmax,
    Queries,
    SavedForward,
    SoftmaxParams,
)
from dtcp.sequence.layout import HeadTail
from dtcp.softmax import RingAttention
from tests.harness import packings
from tests.harness.attention_parity import (
    CAUSAL,
    Case,
    errors,
    local_inputs,
    mixer_on,
    run,
    shard_case,
)
from tests.harness.bias_cases import biased_cases, biased_errors
from tests.harness.far_apart import far_apart
from tests.harness.interpreter import patch_language_once_a_launch
from tests.harness.kernel_cases import kernel_cases, kernel_errors

RANKS = 2
RESULTS = ("out", "lse", "dq", "dk", "dv")


def ring() -> dict[str, float]:
    """The kernels under a strategy: a ring does not know which backend computes."""
    mesh = init_device_mesh("cpu", (RANKS,), mesh_dim_names=("cp",))
    case = Case(CAUSAL, packings.two_rows, seq_len=64, heads=2, kv_heads=1, dtype=torch.float32)
    mixer = mixer_on(mesh, RingAttention(), case.mask_case.mask)
    sharded = shard_case(case, mixer, mesh, HeadTail)
    return errors(case, run(case, mixer, sharded, local_inputs(case, sharded)), sharded)


def far_strides() -> dict[str, float]:
    """Operands as they are, and far apart in memory by token or by channel: the same bits."""
    draw = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(1, 130, 1, 16, generator=draw).half() for _ in range(4))
    with tempfile.TemporaryDirectory() as folder:
        files = (Path(folder, name) for name in "qkvg")
        spread = zip((q, k, v, grad), (1, 3, 1, 3), files, strict=True)
        far = _attended(*(far_apart(*each) for each in spread))
        near = _attended(q, k, v, grad)
    return {
        name: float((ours != right).sum())
        for name, ours, right in zip(RESULTS, far, near, strict=True)
    }


def _attended(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """Causal attention by Triton's kernels: out, lse, dq, dk and dv."""
    index = torch.arange(q.shape[1], dtype=torch.int32)
    return _interval_attended(Queries(q, 0 * index[None], index[None]), Keys(k, v, index), grad)


def _interval_attended(queries: Queries, keys: Keys, grad: Tensor) -> tuple[Tensor, ...]:
    q, k, v = queries.q, keys.k, keys.v
    kernel, params = TritonAttention(), SoftmaxParams(0.25)
    state = OnlineSoftmax.empty(q, v.shape[-1])
    kernel.attend(state, queries, keys, params)
    saved = SavedForward(grad, state.out.to(q.dtype), state.lse)
    grads = GradAccumulators(*(torch.zeros(x.shape) for x in (q, k, v)))
    kernel.attend_backward(grads, saved, queries, keys, params)
    return (*state, *grads)


def on_other_ranks() -> dict[str, dict[str, int]]:
    """How many numbers differ where ranks have a part of the queries, or of the heads.

    A rank has the keys that its queries require, so that its tiles find theirs at other places.
    """
    cases = {"causal": (128, 128), "window": (128, 39), "cut tiles": (120, 120)}
    return {name: _differ(*of_case, ranks=2) for name, of_case in cases.items()}


def _differ(seq_len: int, window: int, *, ranks: int) -> dict[str, int]:
    """Numbers of each result that are not one rank's: of ranks by tokens, and by heads."""
    draw, layout = torch.Generator().manual_seed(0), HeadTail(seq_len, ranks)
    q, k, v, grad = (torch.randn(1, seq_len, ranks, 16, generator=draw) for _ in range(4))
    last = torch.arange(seq_len, dtype=torch.int32)
    first = torch.maximum(torch.where(last < 45, 0, 45).int(), last - window + 1)
    whole = _interval_attended(Queries(q, first[None], last[None]), Keys(k, v, last), grad)
    # Of keys' gradients, ranks that have a part of the queries have a part of the sum.
    counts = dict.fromkeys((*RESULTS[:3], *(f"{each} of heads" for each in RESULTS)), 0)
    for rank in range(ranks):
        own = layout.token_indices(rank)
        seen = (first[own, None] <= last) & (last <= last[own, None])
        required = seen.any(0).nonzero()[:, 0]
        part = _interval_attended(
            Queries(q[:, own], first[None, own], last[None, own]),
            Keys(k[:, required], v[:, required], last[required]),
            grad[:, own],
        )
        for name, ours, right in zip(RESULTS[:3], part, whole, strict=False):
            counts[name] += int((ours != right[:, own]).sum())
        heads = slice(rank, rank + 1)
        q_own, k_own, v_own, grad_own = (x[:, :, heads] for x in (q, k, v, grad))
        queries = Queries(q_own, first[None], last[None])
        part = _interval_attended(queries, Keys(k_own, v_own, last), grad_own)
        for name, ours, right in zip(RESULTS, part, whole, strict=True):
            counts[f"{name} of heads"] += int((ours != right[:, :, heads]).sum())
    return counts


def with_a_bias(rank: int) -> dict[str, dict[str, float]]:
    """The cases of one process; queries are taken in several goes where their name says so."""
    errors_of, most = {}, bias.MOST_NUMBERS
    for name, case in list(biased_cases().items())[rank::RANKS]:
        bias.MOST_NUMBERS = 1 << 12 if "goes" in name else most
        errors_of[f"bias, {name}"] = biased_errors(case)
    return errors_of


def rank_main(rank: int, store_path: str, results: Any) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of NaNs that the interpreter computes and a mask hides
    own = list(kernel_cases().items())[rank::RANKS]
    errors_of = {name: kernel_errors(case) for name, case in own}
    errors_of |= with_a_bias(rank)
    if rank == 0:
        errors_of["far apart"] = far_strides()
    else:
        errors_of |= {f"on ranks, {name}": of_case for name, of_case in on_other_ranks().items()}
    store = dist.FileStore(store_path, RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    errors_of[f"ring, rank {rank}"] = ring()
    dist.destroy_process_group()
    results.put(errors_of)


def main() -> None:
    patch_language_once_a_launch()
    ranges.SCAN = 2  # so that rows as short as these need several steps
    results, errors_of = mp.get_context("fork").SimpleQueue(), {}
    with tempfile.TemporaryDirectory() as folder:
        ranks = mp.start_processes(
            rank_main, (f"{folder}/store", results), RANKS, join=False, start_method="fork"
        )
        while not ranks.join():
            pass
    for _ in range(RANKS):
        errors_of.update(results.get())
    print(json.dumps(errors_of))


if __name__ == "__main__":
    main()
