"""One GatedDeltaNet layer on the tokens that a rank has, segment by segment.

`forward_on_segments` computes what transformers' layer does, on segments whose states and
convolution windows come from the segments before them, on whichever rank those are.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F

from dtcp._torch.compiler import assert_in_graph
from dtcp.distributed.groups import group_name
from dtcp.recurrent.metadata import ConvMetadata, DeltaMetadata, chain_of, halo_route
from dtcp.recurrent.mixer import GatedDeltaRule
from dtcp.recurrent.moves import DeltaShape
from dtcp.recurrent.op import gated_delta_rule
from dtcp.recurrent.state_exchange import FEWEST_BYTES
from dtcp.sequence.layout import SequenceLayout

UNIT = GatedDeltaRule().unit
"""Scales queries and keys to unit length."""


def forward_on_segments(
    layer: Any, x: Tensor, index: Tensor, layout: SequenceLayout, axis: DeviceMesh | None
) -> Tensor:
    """Apply a CPAwareGatedDeltaNet to the tokens of a layout's shard.

    Args:
        layer: whose projections, convolution, decay and norm are used.
        x: [B, L, E].
        index: [B, L] int64, of each token in its document.
        axis: the 1-D axis of the sequence; None on one device.
    Returns:
        [B, L, E].

    Traffic per rank: W - 1 tokens of q, k and v per segment to the next segment, and the states
    that GatedDeltaCP exchanges.
    """
    groups = [] if axis is None else [group_name(axis)]
    chain = chain_of(layout)
    route = halo_route(layout, layer.conv_kernel_size, 0 if axis is None else axis.get_local_rank())
    reach = index.clamp(max=layer.conv_kernel_size - 1).to(torch.int32)
    conv = ConvMetadata(reach.unflatten(1, (chain.shape[1], -1)), route)
    rule = DeltaMetadata((index == 0).to(torch.int32), chain)

    mixed, z, b, a = _project(layer, x)
    mixed = layer._conv1d_with_cp(mixed.transpose(1, 2), (conv, groups)).transpose(1, 2)
    q, k, v = mixed.split((layer.key_dim, layer.key_dim, layer.value_dim), dim=-1)
    q, k = UNIT(*(y.unflatten(-1, (-1, layer.head_k_dim)) for y in (q, k)))
    v = v.unflatten(-1, (-1, layer.head_v_dim))
    wide = torch.promote_types(a.dtype, torch.float32)
    g = -layer.A_log.to(wide).exp() * F.softplus(a.to(wide) + layer.dt_bias)
    ranks, segments = chain.shape
    scan = FEWEST_BYTES.scans(ranks, segments, DeltaShape.of(k, v).summary)
    out = gated_delta_rule(q, k, v, g, b.sigmoid(), rule, scan=scan, groups=groups)
    normed = layer.norm(out.flatten(0, 2), z.reshape(-1, layer.head_v_dim))
    return layer.out_proj(normed.unflatten(0, out.shape[:3]).flatten(2))


def check_call(
    x: Tensor, mask: Tensor | None, qkv_format: str | None, cu_seqlens: Tensor | None
) -> None:
    """Refuse arguments of another shape.

    Raises:
        ValueError: a qkv_format other than bshd and thd, cu_seqlens of several rows, a mask that
            is not sharded with its tokens.
    """
    if qkv_format not in (None, "bshd", "thd"):
        raise ValueError(
            f"A layer takes tokens as bshd or thd, got qkv_format={qkv_format!r}: pass "
            f"[B, L, E], or one row of packed documents."
        )
    if cu_seqlens is not None and (x.shape[0] != 1 or cu_seqlens.numel() != cu_seqlens.shape[-1]):
        raise ValueError(
            f"cu_seqlens describes one packed row, got hidden_states.shape={tuple(x.shape)} with "
            f"cu_seqlens.shape={tuple(cu_seqlens.shape)}: pass rows one by one, or position_ids "
            f"that restart, with seq_index."
        )
    if mask is not None and mask.shape != x.shape[:2]:
        raise ValueError(
            f"A padding mask has one value per local token, got attention_mask.shape="
            f"{tuple(mask.shape)} for hidden_states.shape={tuple(x.shape)}: shard it with them."
        )


def index_in_document(
    x: Tensor, token_index: Tensor, position_ids: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    """Index of each token in its document, not read on the host: [B, L] int64.

    Args:
        x: [B, L, E].
        token_index: [L], of each token in the whole row.
        position_ids: [B, L] or [4, B, L], the first axis of which counts tokens; any other shape
            is one document.
        cu_seqlens: [N + 1], of the whole row; wins if given.
    """
    if cu_seqlens is not None:
        starts = cu_seqlens.to(torch.int64).flatten()
        assert_in_graph(
            starts[0] == 0, "cu_seqlens starts at 0, got another start: give the whole row's."
        )
        # Packed rows in chunks fill boundaries up with a negative number: no document starts there.
        starts = starts.where(starts >= 0, torch.iinfo(torch.int64).max)
        first = starts[torch.searchsorted(starts, token_index, right=True) - 1]
        return (token_index - first).expand(x.shape[0], -1).contiguous()
    if position_ids is not None and position_ids.ndim == 3 and position_ids.shape[0] == 4:
        position_ids = position_ids[0]
    if position_ids is not None and position_ids.ndim <= 2:
        return position_ids.to(torch.int64).expand(x.shape[0], -1).contiguous()
    # Time, height and width of images do not say where documents start.
    return token_index.expand(x.shape[0], -1).contiguous()


def _project(layer: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k and v in one [B, L, C], and z, b, a."""
    if hasattr(layer, "in_proj_qkv"):
        return layer.in_proj_qkv(x), layer.in_proj_z(x), layer.in_proj_b(x), layer.in_proj_a(x)
    q, k, v, z, b, a = layer.fix_query_key_value_ordering(
        layer.in_proj_qkvz(x), layer.in_proj_ba(x)
    )
    return torch.cat([y.flatten(2) for y in (q, k, v)], dim=-1), z, b, a
