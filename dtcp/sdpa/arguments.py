"""What every way into attention on a sharded sequence accepts of torch's function, and refuses."""

from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

SDPA_HEADS, SDPA_SEQ = 1, 2  # dims of torch's [B, H, L, D]


def check_arguments(
    q: DTensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float
) -> None:
    """Refuse what no way can honour, of a query whose sequence is sharded.

    Raises:
        ValueError: a mask as a tensor, dropout, q, k and v that are sharded differently or of
            different lengths, or a sequence that its axes do not divide.
    """
    if mask is not None:
        raise ValueError(
            f"Attention on a sharded sequence takes no mask as a tensor, got "
            f"attn_mask.shape={tuple(mask.shape)}: use is_causal, or SoftmaxAttention with a Mask."
        )
    if dropout_p != 0.0:
        raise ValueError(
            f"Attention on a sharded sequence has no dropout, whose pattern would depend on the "
            f"mesh, got dropout_p={dropout_p}: set it to 0."
        )
    for x in (k, v):
        if not isinstance(x, DTensor) or x.placements != q.placements:
            raise ValueError(
                f"Attention takes q, k and v sharded alike, got {q.placements} and "
                f"{getattr(x, 'placements', 'a plain tensor')}: redistribute them."
            )
    if q.shape[SDPA_SEQ] != k.shape[SDPA_SEQ] or k.shape[SDPA_SEQ] != v.shape[SDPA_SEQ]:
        raise ValueError(
            f"Attention on a sharded sequence is self-attention, got {q.shape[SDPA_SEQ]} queries "
            f"and {k.shape[SDPA_SEQ]} keys: keep cross-attention's keys unsharded and local."
        )
    sizes = [q.device_mesh.size(i) for i, p in enumerate(q.placements) if p == Shard(SDPA_SEQ)]
    if len(sizes) > 1 or q.shape[SDPA_SEQ] % sizes[0]:
        raise ValueError(
            f"The sequence is sharded on one axis that divides it, got "
            f"seq_len={q.shape[SDPA_SEQ]} on axes of {sizes} ranks: pad it, or shard it on one."
        )
