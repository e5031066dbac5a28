"""The gated delta rule as a pair of ops, `dtcp::gated_delta_rule` and its backward."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dtcp.kernels.delta_rule.api import DeltaInputs, delta_kernel
from dtcp.recurrent.exchange import MATRICES
from dtcp.recurrent.metadata import DeltaMetadata
from dtcp.recurrent.moves import DeltaShape
from dtcp.recurrent.rule import RuleOp
from dtcp.sequence.arguments import FLOATS, check_tensor

DELTA_RULE = RuleOp(
    "gated_delta_rule", "The delta rule", DeltaInputs, delta_kernel, DeltaShape, MATRICES
)


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    metadata: DeltaMetadata,
    *,
    scan: bool = False,
    groups: Sequence[str] = (),
) -> Tensor:
    """The rule on this rank's segments, states from other ranks included: [B, L, H, V].

    Args:
        q, k: [B, L, G, K], q scaled.
        v: [B, L, H, V].
        g: [B, L, H], or [B, L, H, K] for a decay of each key channel.
        beta: [B, L, H].
        metadata: of the batch.
        scan: bring states by a scan, rather than by gathering them.
        groups: the process group of the sequence; none for whole rows.
    """
    named: dict[str, Any] = {"q": q, "k": k, "v": v, "g": g, "beta": beta}
    check_tensor("The delta rule", dtypes=FLOATS, **named)
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(
            f"The delta rule computes in one floating dtype, got q.dtype={q.dtype}, "
            f"k.dtype={k.dtype}, v.dtype={v.dtype}: convert q, k and v to one."
        )
    if v.ndim != 4:
        raise ValueError(
            f"The delta rule writes a value per token and head, got v.shape={tuple(v.shape)}: "
            f"give [B, L, H, V]."
        )
    if g.shape not in (v.shape[:3], (*v.shape[:3], k.shape[-1])):
        raise ValueError(
            f"The delta rule decays by value head, or by key channel of one, got g.shape="
            f"{tuple(g.shape)} with k.shape={tuple(k.shape)}, v.shape={tuple(v.shape)}: give g as "
            f"[B, L, H] or [B, L, H, K]."
        )
    if (
        q.shape != k.shape
        or q.shape[:2] != v.shape[:2]
        or v.shape[2] % q.shape[2]
        or beta.shape != v.shape[:3]
    ):
        raise ValueError(
            f"The delta rule takes one query, key, value and beta per token and head, got q.shape="
            f"{tuple(q.shape)}, k.shape={tuple(k.shape)}, v.shape={tuple(v.shape)}, beta.shape="
            f"{tuple(beta.shape)}: give q, k [B, L, G, K], v [B, L, H, V] and beta [B, L, H], H a "
            f"multiple of G."
        )
    return DELTA_RULE(q, k, v, g, beta, metadata=metadata, scan=scan, groups=groups)
