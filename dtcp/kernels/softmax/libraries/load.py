"""Import the package behind a backend, once that backend was chosen."""

import importlib
from collections.abc import Callable
from typing import Any

import torch

from dtcp.kernels.softmax.calls import Call
from dtcp.kernels.softmax.demand import Demand
from dtcp.kernels.softmax.libraries.aten_flash import AtenFlash
from dtcp.kernels.softmax.libraries.cudnn import CudnnAttention
from dtcp.kernels.softmax.libraries.ffpa import FFPA, FFPAFunctions
from dtcp.kernels.softmax.libraries.flash2 import Flash2Functions, FlashAttention2
from dtcp.kernels.softmax.libraries.flash3 import FlashAttention3
from dtcp.kernels.softmax.libraries.flash4 import (
    Flash4Functions,
    FlashAttention4,
    FlashIntervalAttention,
    block_size,
)
from dtcp.kernels.softmax.libraries.flash4_mask import interval_mask_function
from dtcp.kernels.softmax.plain import PlainAttention, PlainKernel
from dtcp.kernels.softmax.types import AttentionKernel


def library_kernel(name: str, demand: Demand, calls: tuple[Call, ...] | None) -> AttentionKernel:
    """The kernel of a backend that others wrote, for the calls that a mask comes to.

    Args:
        calls: None for a mask that is no plain window.
    """
    if name == "flash" and calls is None:
        width = max(demand.key_width, demand.value_width)
        return FlashIntervalAttention(_flash4(), block_size(width, demand.arch))
    assert calls is not None, "a backend that does intervals has a kernel for them"
    makers: dict[str, Callable[[], PlainKernel]] = {
        "flash": lambda: FlashAttention4(_flash4()),
        "flash3": _flash3,
        "flash2": _flash2,
        "ffpa": _ffpa,
        "cudnn": lambda: CudnnAttention(
            torch.ops.aten._scaled_dot_product_cudnn_attention,
            torch.ops.aten._scaled_dot_product_cudnn_attention_backward,
        ),
        "aten_flash": lambda: AtenFlash(
            torch.ops.aten._flash_attention_forward, torch.ops.aten._flash_attention_backward
        ),
    }
    return PlainAttention(makers[name](), calls)


def functions_of(module: str, *names: str) -> list[Callable[..., Any]]:
    """Import a module and take these names of it, some of which are private to it."""
    imported = importlib.import_module(module)
    return [getattr(imported, name) for name in names]


def _flash4() -> Flash4Functions:
    names = ("_flash_attn_fwd", "_flash_attn_bwd")
    forward, backward = functions_of("flash_attn.cute.interface", *names)
    (tensors,) = functions_of("flash_attn.cute.block_sparsity", "BlockSparseTensorsTorch")
    return Flash4Functions(forward, backward, tensors, interval_mask_function())


def _flash3() -> FlashAttention3:
    names = ("_flash_attn_forward", "_flash_attn_backward")
    return FlashAttention3(*functions_of("flash_attn_interface", *names))


def _flash2() -> FlashAttention2:
    names = (
        "_flash_attn_forward",
        "_flash_attn_backward",
        "_flash_attn_varlen_forward",
        "_flash_attn_varlen_backward",
    )
    functions = Flash2Functions(*functions_of("flash_attn.flash_attn_interface", *names))
    return FlashAttention2(functions)


def _ffpa() -> FFPA:
    importlib.import_module("ffpa_attn.cute")
    return FFPA(
        FFPAFunctions(
            torch.ops.ffpa_attn._fwd_cute,
            torch.ops.ffpa_attn._bwd_cute,
            torch.ops.ffpa_attn._varlen_fwd_cute,
            torch.ops.ffpa_attn._varlen_bwd_cute,
        )
    )
