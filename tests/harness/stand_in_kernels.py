"""Backends of other people on stand-ins, chosen as they would be on a GPU that has them."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from dtcp.kernels.softmax.backends import backend_named
from dtcp.kernels.softmax.calls import Call, calls_of
from dtcp.kernels.softmax.demand import Demand, demand_of, refusal
from dtcp.kernels.softmax.libraries.aten_flash import AtenFlash
from dtcp.kernels.softmax.libraries.cudnn import CudnnAttention
from dtcp.kernels.softmax.libraries.ffpa import FFPA, FFPAFunctions
from dtcp.kernels.softmax.libraries.flash2 import Flash2Functions, FlashAttention2
from dtcp.kernels.softmax.libraries.flash3 import FlashAttention3
from dtcp.kernels.softmax.libraries.flash4 import (
    BlockSize,
    Flash4Functions,
    FlashAttention4,
    FlashIntervalAttention,
)
from dtcp.kernels.softmax.plain import PlainAttention, PlainKernel
from dtcp.kernels.softmax.reference import ReferenceAttention
from dtcp.kernels.softmax.types import AttentionKernel, Keys, Queries, SoftmaxParams
from tests.harness import stand_ins

FLASH4 = Flash4Functions(
    stand_ins.flash4_forward,
    stand_ins.flash4_backward,
    stand_ins.Sparsity,
    stand_ins.interval_mask,
)
FLASH2 = Flash2Functions(
    stand_ins.flash2_forward,
    stand_ins.flash2_backward,
    stand_ins.flash2_varlen_forward,
    stand_ins.flash2_varlen_backward,
)
PLAIN: dict[str, Callable[[], PlainKernel]] = {
    "flash": lambda: FlashAttention4(FLASH4),
    "flash3": lambda: FlashAttention3(stand_ins.flash3_forward, stand_ins.flash3_backward),
    "flash2": lambda: FlashAttention2(FLASH2),
    "cudnn": lambda: CudnnAttention(
        stand_ins.AtenOps._scaled_dot_product_cudnn_attention,
        stand_ins.AtenOps._scaled_dot_product_cudnn_attention_backward,
    ),
    "aten_flash": lambda: AtenFlash(
        stand_ins.AtenOps._flash_attention_forward, stand_ins.AtenOps._flash_attention_backward
    ),
    "ffpa": lambda: FFPA(
        FFPAFunctions(
            stand_ins.FFPAOps._fwd_cute,
            stand_ins.FFPAOps._bwd_cute,
            stand_ins.FFPAOps._varlen_fwd_cute,
            stand_ins.FFPAOps._varlen_bwd_cute,
        )
    ),
}
UNSCALED = SoftmaxParams(1.0)
BLOCKS = BlockSize(16, 8)
"""Small, so that short sequences have several."""


def calls_between(queries: Queries, keys: Keys, pieces: Tensor | None) -> tuple[Call, ...] | None:
    if pieces is None:
        return None
    batch, length = queries.q.shape[:2]
    return calls_of(pieces, batch=batch, length=length, num_keys=keys.k.shape[1])


def on_gpu(demand: Demand, arch: int, *, width: int = 128) -> Demand:
    """The same demand as bf16 tensors with heads of a usual width would make it on a GPU."""
    return replace(
        demand,
        arch=arch,
        dtypes=(torch.bfloat16,) * 3,
        key_width=width,
        value_width=width,
        repeatable=False,
        triton=True,
        triton_width=width,
    )


class StandInKernels:
    """In the place of `attention_kernel`: one backend's stand-in for the calls it can do.

    Args:
        name: of the backend.
    """

    def __init__(self, name: str) -> None:
        self.name, self.used = name, Counter[str]()

    def __call__(
        self, queries: Queries, keys: Keys, params: SoftmaxParams = UNSCALED
    ) -> AttentionKernel:
        calls = calls_between(queries, keys, keys.pieces)
        width = 512 if self.name == "ffpa" else 128
        demand = on_gpu(demand_of(queries, keys, calls, params), 90, width=width)
        backend = replace(backend_named(self.name), package=None)
        if refusal(backend, demand) is not None:
            self.used["another"] += 1
            return ReferenceAttention()
        if calls is None:
            self.used["interval"] += 1
            return FlashIntervalAttention(FLASH4, BLOCKS)
        for call in calls:
            self.used[f"packed {call.kind.value}" if call.packed else call.kind.value] += 1
        return PlainAttention(PLAIN[self.name](), calls)
