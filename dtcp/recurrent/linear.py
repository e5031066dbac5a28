"""Gated linear attention as a pair of ops, `dtcp::gated_linear_attention` and its backward."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dtcp.kernels.dtypes import accumulation
from dtcp.kernels.linear_attention.api import linear_kernel
from dtcp.kernels.linear_attention.types import LinearInputs
from dtcp.recurrent.exchange import SCALES
from dtcp.recurrent.metadata import DeltaMetadata
from dtcp.recurrent.moves import LinearShape
from dtcp.recurrent.rule import RuleOp
from dtcp.sequence.arguments import FLOATS, check_tensor

LINEAR = RuleOp(
    "gated_linear_attention", "Linear attention", LinearInputs, linear_kernel, LinearShape, SCALES
)


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    metadata: DeltaMetadata,
    *,
    scan: bool = False,
    groups: Sequence[str] = (),
) -> Tensor:
    """Linear attention on this rank's segments, states from other ranks included: [B, L, H, V].

    Args:
        q, k: [B, L, G, K], q scaled.
        v: [B, L, H, V], in the dtype of q and k or in that of their sums: values that were made by
            a product need not be rounded for it.
        g: [B, L, H], or [B, L, H, K] for a decay of each key channel.
        metadata: of the batch.
        scan: bring states by a scan, rather than by gathering them.
        groups: the process group of the sequence; none for whole rows.
    """
    named: dict[str, Any] = {"q": q, "k": k, "v": v, "g": g}
    check_tensor("Linear attention", dtypes=FLOATS, **named)
    if q.dtype != k.dtype or v.dtype not in (q.dtype, accumulation(q.dtype)):
        raise TypeError(
            f"Linear attention computes in one floating dtype, with values in it or in fp32, got "
            f"q.dtype={q.dtype}, k.dtype={k.dtype}, v.dtype={v.dtype}: convert q, k and v to one."
        )
    fits = q.ndim == v.ndim == 4 and q.shape == k.shape and q.shape[:2] == v.shape[:2]
    if (
        not fits
        or v.shape[2] % q.shape[2]
        or g.shape not in (v.shape[:3], (*v.shape[:3], k.shape[-1]))
    ):
        raise ValueError(
            f"Linear attention takes one query, key, value and decay per token and head, got "
            f"q.shape={tuple(q.shape)}, k.shape={tuple(k.shape)}, v.shape={tuple(v.shape)}, "
            f"g.shape={tuple(g.shape)}: give q, k [B, L, G, K], v [B, L, H, V], H a multiple of G, "
            f"and g [B, L, H] or [B, L, H, K]."
        )
    return LINEAR(q, k, v, g, metadata=metadata, scan=scan, groups=groups)
