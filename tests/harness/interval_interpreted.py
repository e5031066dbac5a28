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
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh

from dtcp.kernels.softmax.triton import ranges
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
from tests.harness.interpreter import patch_language_once_a_launch
from tests.harness.kernel_cases import kernel_cases, kernel_errors

RANKS = 2


def ring() -> dict[str, float]:
    """The kernels under a strategy: a ring does not know which backend computes."""
    mesh = init_device_mesh("cpu", (RANKS,), mesh_dim_names=("cp",))
    case = Case(CAUSAL, packings.two_rows, seq_len=64, heads=2, kv_heads=1, dtype=torch.float32)
    mixer = mixer_on(mesh, RingAttention(), case.mask_case.mask)
    sharded = shard_case(case, mixer, mesh, HeadTail)
    return errors(case, run(case, mixer, sharded, local_inputs(case, sharded)), sharded)


def rank_main(rank: int, store_path: str, results: Any) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of NaNs that the interpreter computes and a mask hides
    own = list(kernel_cases().items())[rank::RANKS]
    errors_of = {name: kernel_errors(case) for name, case in own}
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
