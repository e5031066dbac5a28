"""The strategy that is taken where nobody names one."""

import logging
from functools import cache

import torch
from torch.distributed.device_mesh import DeviceMesh

from dtcp.compile import Boundary, InGraph
from dtcp.softmax.all_gather import AllGatherAttention
from dtcp.softmax.ring import RingAttention

LOG = logging.getLogger("dtcp.softmax")
IN_GRAPH = InGraph()


def default_attention(
    device_type: str, *, boundary: Boundary = IN_GRAPH, reduce_dtype: torch.dtype | None = None
) -> RingAttention | AllGatherAttention:
    """A ring on hosts; on GPUs one call over all keys that a rank requires.

    The fast kernels of a GPU round what they return, and a ring merges n such results: 1.4 times
    the error of one device in bf16, where one call has the same error in its output and in the
    gradients of queries. Gradients of keys are sums over ranks for either, and what these have
    rounded (`note_rounded_sums` says so). One call holds these keys while it attends; where they do
    not fit, name RingAttention; with reduce_dtype=torch.float32 its parts are merged in fp32, and
    so are gradients of keys. Said once.
    """
    if device_type == "cpu":
        return RingAttention(boundary=boundary, reduce_dtype=reduce_dtype)
    _say_so()
    return AllGatherAttention(boundary=boundary, reduce_dtype=reduce_dtype)


def device_type_of(cp: DeviceMesh | None) -> str:
    """What the ranks of cp compute on; "cpu" for a rank by itself, which exchanges nothing."""
    return "cpu" if cp is None else cp.device_type


@cache
def _say_so() -> None:
    LOG.info(
        "Attention over ranks is AllGatherAttention: one call over all required keys, with the "
        "error of one device, while a ring merges results that its kernels have rounded, with 1.4 "
        "times that. Name RingAttention where the keys do not fit into memory."
    )
