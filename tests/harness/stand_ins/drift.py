"""Where stand-ins and the packages that are installed here differ."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch

from tests.harness.stand_ins.aten import NOT_IN_2_11, AtenOps
from tests.harness.stand_ins.ffpa import FFPAOps
from tests.harness.stand_ins.flash2 import (
    flash2_backward,
    flash2_forward,
    flash2_varlen_backward,
    flash2_varlen_forward,
)
from tests.harness.stand_ins.flash3 import flash3_backward, flash3_forward
from tests.harness.stand_ins.flash4 import (
    Sparsity,
    flash4_backward,
    flash4_forward,
    flash4_sparse_backward,
)

PYTHON_FUNCTIONS = {
    "flash_attn.cute.interface:_flash_attn_fwd": flash4_forward,
    "flash_attn.cute.interface:_flash_attn_bwd": flash4_backward,
    "flash_attn.cute.interface:_flash_attn_bwd_sparse_mla": flash4_sparse_backward,
    "flash_attn.cute.block_sparsity:BlockSparseTensorsTorch": Sparsity,
    "flash_attn_interface:_flash_attn_forward": flash3_forward,
    "flash_attn_interface:_flash_attn_backward": flash3_backward,
    "flash_attn.flash_attn_interface:_flash_attn_forward": flash2_forward,
    "flash_attn.flash_attn_interface:_flash_attn_varlen_forward": flash2_varlen_forward,
    "flash_attn.flash_attn_interface:_flash_attn_backward": flash2_backward,
    "flash_attn.flash_attn_interface:_flash_attn_varlen_backward": flash2_varlen_backward,
}


def signature_drift() -> Iterator[tuple[str, str]]:
    """(name, difference) for each function that can be imported here; '' where there is none."""
    for name, stand_in in PYTHON_FUNCTIONS.items():
        module, _, attribute = name.partition(":")
        try:
            real = getattr(__import__(module, fromlist=[attribute]), attribute)
        except ImportError:
            continue
        # A custom op keeps the function it was made of.
        real = getattr(real, "_init_fn", real)
        yield name, _difference(_parameters(stand_in), _parameters(real))
    try:
        import ffpa_attn.cute  # noqa: F401
    except ImportError:
        namespaces = {"aten": AtenOps}
    else:
        namespaces = {"aten": AtenOps, "ffpa_attn": FFPAOps}
    for namespace, ops in namespaces.items():
        for name, stand_in in vars(ops).items():
            if isinstance(stand_in, staticmethod):
                packet = getattr(getattr(torch.ops, namespace), name)
                schema = [(x.name, x.default_value) for x in packet.default._schema.arguments]
                own = [
                    (each, None if default is inspect.Parameter.empty else default)
                    for each, default in _parameters(stand_in.__func__)
                    if each not in NOT_IN_2_11 or each in dict(schema)
                ]
                yield f"{namespace}::{name}", _difference(own, schema)


def _parameters(function: Callable[..., Any]) -> list[tuple[str, Any]]:
    return [(x.name, x.default) for x in inspect.signature(function).parameters.values()]


def _difference(own: list[tuple[str, Any]], real: list[tuple[str, Any]]) -> str:
    if own == real:
        return ""
    lacking = [x for x in real if x not in own]
    surplus = [x for x in own if x not in real]
    return f"the real one has {lacking}, the stand-in {surplus}" if lacking or surplus else "order"
