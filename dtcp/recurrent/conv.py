"""A short causal convolution over a sharded sequence: w - 1 tokens from the left of each segment.

The exchange is an op of its own; the taps are a sum of w products in plain torch, which the
compiler fuses with what stands around them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dtcp.distributed.collectives import axis_of, exchange
from dtcp.distributed.ops import communicating_op
from dtcp.kernels.dtypes import accumulation
from dtcp.sequence.layout import SequenceLayout
from dtcp.sequence.masks import Coords
from dtcp.sequence.routes import Route, halo_runs


class ConvMetadata(NamedTuple):
    """What a convolution reads of a batch. int32 goes to the device, int64 stays on the host."""

    reach: Tensor  # [B, P, T] int32, tokens before each one in its document, at most w - 1
    route: Tensor  # [2, P, 3] int64, what is sent and what is received: rank, start, stop


def conv_metadata(
    coords: Coords, width: int, layout: SequenceLayout | None, rank: int = 0
) -> ConvMetadata:
    """Tables of one rank; of whole rows without a layout.

    Raises:
        ValueError: segments shorter than what a token reads to its left.
    """
    reach = (coords.token_index - coords.start).clamp(max=width - 1).to(torch.int32)
    if layout is None:
        return ConvMetadata(reach[:, None], torch.zeros(2, 1, 3, dtype=torch.int64))
    route = halo_route(layout, width, rank)
    return ConvMetadata(layout.shard(reach, rank).unflatten(1, (route.shape[1], -1)), route)


def halo_route(layout: SequenceLayout, width: int, rank: int) -> Tensor:
    """What a rank sends and receives of the tokens left of segments: [2, P, 3] int64.

    Raises:
        ValueError: segments shorter than what a token reads to its left.
    """
    if layout.segment_len < width - 1:
        raise ValueError(
            f"A convolution reads {width - 1} tokens from the segment left of its own, got "
            f"segment_len={layout.segment_len} with {layout}: use fewer ranks, or longer rows."
        )
    ranks = range(layout.num_shards)
    held = [layout.runs(r) for r in ranks]
    wanted = [halo_runs(layout, r, left=width - 1, right=0) for r in ranks]
    route, count = Route.between(held, wanted, rank), len(layout.segments(rank))
    return torch.stack([_filled(hops, count) for hops in (route.send, route.receive)])


def causal_conv(
    x: Tensor, weight: Tensor, metadata: Sequence[Tensor], *, groups: Sequence[str] = ()
) -> Tensor:
    """Each channel's own sum over the last w tokens of the document: [B, L, C].

    Args:
        x: [B, L, C].
        weight: [C, w], the token's own tap last.
        metadata: ConvMetadata.
        groups: the process group of the sequence; none for whole rows.

    Traffic per rank: w - 1 tokens a segment, and as much back.
    """
    reach, route = metadata
    if reach.shape[0] != x.shape[0] or reach[0].numel() != x.shape[1]:
        raise ValueError(
            f"A convolution reads the tables of its own batch, got tables for "
            f"{tuple(reach.shape)} tokens with x.shape={tuple(x.shape)}: pass the tables that "
            f"were made with this batch."
        )
    width, count = weight.shape[1], reach.shape[1]
    segments = x.unflatten(1, (count, -1))
    if groups:
        halo: Tensor = _halo(x, route, count * (width - 1), groups[0])
        line = torch.cat((halo.unflatten(1, (count, -1)), segments), dim=2)
    else:
        line = F.pad(segments, (0, 0, width - 1, 0))
    return _taps(line, weight, reach).flatten(1, 2).to(x.dtype)


def _taps(line: Tensor, weight: Tensor, reach: Tensor) -> Tensor:
    """line [B, P, w - 1 + T, C] -> [B, P, T, C], fp32 at least."""
    width, length = weight.shape[1], reach.shape[2]
    wide = accumulation(line.dtype)
    out = line[:, :, width - 1 :].to(wide) * weight[:, width - 1].to(wide)
    for back in range(1, width):
        taken = line.narrow(2, width - 1 - back, length).to(wide)
        tap = taken * weight[:, width - 1 - back].to(wide)
        out = out + tap.where((reach >= back)[..., None], 0)
    return out


@communicating_op("dtcp::left_halo")
def _halo(x: Tensor, route: Tensor, length: int, group: str) -> Tensor:
    """The tokens left of each segment, from whoever holds them: [B, length, C]."""
    send, receive = _hops(route)
    return exchange(x, Route(send, receive, length), axis_of(group, x.device))


@_halo.register_fake
def _(x: Tensor, route: Tensor, length: int, group: str) -> Tensor:
    return x.new_empty(x.shape[0], length, *x.shape[2:])


@communicating_op("dtcp::left_halo_backward")
def _halo_backward(grad: Tensor, route: Tensor, length: int, group: str) -> Tensor:
    """The gradients home, zero elsewhere: [B, L, C]."""
    send, receive = _hops(route)
    return exchange(grad, Route(receive, send, length), axis_of(group, grad.device))


@_halo_backward.register_fake
def _(grad: Tensor, route: Tensor, length: int, group: str) -> Tensor:
    return grad.new_empty(grad.shape[0], length, *grad.shape[2:])


def _keep(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, route, _, ctx.group = inputs
    ctx.length = x.shape[1]
    ctx.save_for_backward(route)


def _home(ctx, grad):  # type: ignore[no-untyped-def]
    (route,) = ctx.saved_tensors
    return _halo_backward(grad, route, ctx.length, ctx.group), None, None, None


_halo.register_autograd(_home, setup_context=_keep)


def _filled(hops: Sequence[tuple[int, int, int]], count: int) -> Tensor:
    """A table of `count` hops; those of length zero fill it up, so that all ranks' are alike."""
    return torch.tensor([*hops, *[(0, 0, 0)] * (count - len(hops))]).view(count, 3)


def _hops(route: Tensor) -> tuple[tuple[tuple[int, int, int], ...], ...]:
    return tuple(tuple((r, a, b) for r, a, b in side if a < b) for side in route.tolist())
