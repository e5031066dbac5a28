"""Run the interval kernels in Triton's interpreter against the reference: for test_interval.py.

Triton reads TRITON_INTERPRET when it is imported, so this is a process of its own; two, which
share the cases out and then are the ranks of a ring. Nothing is put in the kernels' place: where
Triton interprets, attention of CPU tensors in fp32 and fp16 is theirs (triton_support.usable).

Prints the largest error of every result, over the largest value.
"""

import json
import tempfile
import warnings
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh

from dtcp.kernels.softmax.triton import ranges as interval_runs
from dtcp.sequence.layout import HeadTail
from dtcp.softmax import RingAttention
from tests.harness import packings as cases
from tests.harness.attention_parity import (
    CAUSAL,
    Case,
    errors,
    local_inputs,
    mixer_on,
    plan_of,
    run,
)
from tests.harness.kernel_cases import check, meetings

RANKS = 2


def ring() -> dict[str, float]:
    """The seam under a strategy: nothing of a ring knows which kernel it was."""
    mesh = init_device_mesh("cpu", (RANKS,), mesh_dim_names=("cp",))
    case = Case(CAUSAL, cases.two_rows, seq_len=64, heads=2, kv_heads=1, dtype=torch.float32)
    mixer = mixer_on(mesh, RingAttention(), case.sight.mask)
    plan = plan_of(case, mixer, mesh, HeadTail)
    return errors(case, run(case, mixer, plan, local_inputs(case, plan)), plan)


def rank_main(rank: int, meeting: str, results: Any) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # the interpreter computes what a mask then hides
    found = {name: check(at) for name, at in list(meetings().items())[rank::RANKS]}
    store = dist.FileStore(meeting, RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    found[f"ring, rank {rank}"] = ring()
    dist.destroy_process_group()
    results.put(found)


def main() -> None:
    interval_runs.SCAN = 2  # else no row here has tiles for a second look
    results, found = mp.get_context("fork").SimpleQueue(), {}
    with tempfile.TemporaryDirectory() as folder:
        ranks = mp.start_processes(
            rank_main, (f"{folder}/meeting", results), RANKS, join=False, start_method="fork"
        )
        while not ranks.join():
            pass
    for _ in range(RANKS):
        found.update(results.get())
    print(json.dumps(found))


if __name__ == "__main__":
    main()
