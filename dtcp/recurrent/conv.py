"""A short causal convolution over a sharded sequence: tokens from the left of each segment.

The exchange is an op of its own; the taps are a sum of w products in plain torch, which the
compiler fuses with what stands around them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F

from dtcp.distributed.collectives import exchange_tokens
from dtcp.distributed.groups import axis_of, group_of
from dtcp.distributed.moves import Moved
from dtcp.distributed.ops import communicating_op
from dtcp.kernels.dtypes import accumulation
from dtcp.recurrent.metadata import ConvMetadata
from dtcp.sequence.node_routes import NodeRoutes, hands_on
from dtcp.sequence.routes import Route


def causal_conv(
    x: Tensor,
    weight: Tensor,
    metadata: ConvMetadata,
    *,
    bias: Tensor | None = None,
    groups: Sequence[str] = (),
    dilation: int = 1,
) -> Tensor:
    """Each channel's own sum over w tokens of the document, the token's own last: [B, L, C].

    Sums, and those of gradients, are fp32 at least, and rounded once.

    Args:
        x: [B, L, C].
        weight: [C, w], the token's own tap last.
        metadata: of the batch.
        bias: [C], of the sum.
        groups: the process group of the sequence; none for whole rows.
        dilation: d, tokens from one tap to the next.

    Traffic per rank: (w - 1) * d tokens per segment, and as much back.
    """
    reach = metadata.reach
    line = x.flatten(0, 1)[None] if metadata.in_line else x
    if reach.shape[0] != line.shape[0] or reach[0].numel() != line.shape[1]:
        raise ValueError(
            f"A convolution reads the metadata of its own batch, got some for "
            f"{tuple(reach.shape)} tokens with x.shape={tuple(x.shape)}: pass those made "
            f"with this batch."
        )
    left, count = (weight.shape[1] - 1) * dilation, reach.shape[1]
    # Once for all taps and ranks: gradients of a token's copies are added up, and then rounded.
    line = line.to(accumulation(x.dtype))
    segments = line.unflatten(1, (count, -1))
    if groups and not metadata.in_line:
        halo: Tensor = _halo(line, *metadata.routes, count * left, groups[0], x.dtype)
        halo = halo.unflatten(1, (count, -1)).to(line.dtype)
        line = torch.cat((halo, segments), dim=2)
        out = _taps(line, weight, reach, dilation).flatten(1, 2)
    else:
        out = _taps(F.pad(segments, (0, 0, left, 0)), weight, reach, dilation).flatten(1, 2)
        if groups and left:
            halo = _halo(line, *metadata.routes, len(metadata.first_slots), groups[0], x.dtype)
            out = _with_first_tokens(out, halo.to(line.dtype), weight, metadata, dilation)
    out = out if bias is None else out + bias.to(out.dtype)
    return out.reshape(x.shape).to(x.dtype)


def _with_first_tokens(
    out: Tensor, halo: Tensor, weight: Tensor, metadata: ConvMetadata, dilation: int
) -> Tensor:
    """Add what the first tokens of stretches read of the tokens left of them: few, and so apart."""
    reach = metadata.first_reach
    beyond = F.pad(halo.unflatten(1, reach.shape[1:]), (0, 0, 0, reach.shape[2]))
    taps = _taps(beyond, weight, reach, dilation).flatten(1, 2)
    return out.index_add(1, metadata.first_slots, taps)


def _taps(line: Tensor, weight: Tensor, reach: Tensor, dilation: int) -> Tensor:
    """line [B, P, (w - 1) * d + T, C], fp32 at least -> [B, P, T, C]."""
    width, length = weight.shape[1], reach.shape[2]
    weight, left = weight.to(line.dtype), (width - 1) * dilation
    out = line[:, :, left:] * weight[:, width - 1]
    for tap in range(1, width):
        back = tap * dilation
        read = line.narrow(2, left - back, length) * weight[:, width - 1 - tap]
        out = out + read.where((reach >= back)[..., None], 0)
    return out


def halo_moved(
    routes: NodeRoutes, token: int, num_ranks: int, rank: int, *, reverse: bool = False
) -> Moved:
    """What the halo of a convolution moves, with so many bytes per token."""
    counts = [[0] * num_ranks for _ in range(2)]
    for table in routes:
        for tokens, hops in zip(counts, _hops(table), strict=True):
            for peer, start, stop in hops:
                tokens[peer] += stop - start
    sent, received = reversed(counts) if reverse else counts
    return Moved.rows(sent, received, token, rank, workspace=token * sum(sent + received))


def _halo_moves(
    x: Tensor, route: Tensor, onward: Tensor, length: int, group: str, dtype: torch.dtype
) -> Moved:
    return _moved_in(x, NodeRoutes(route, onward), group, dtype, reverse=False)


def _halo_backward_moves(
    grad: Tensor, route: Tensor, onward: Tensor, length: int, group: str
) -> Moved:
    return _moved_in(grad, NodeRoutes(route, onward), group, grad.dtype, reverse=True)


def _moved_in(
    x: Tensor, routes: NodeRoutes, group: str, dtype: torch.dtype, *, reverse: bool
) -> Moved:
    place = dist.get_world_size(group_of(group)), dist.get_rank(group_of(group))
    return halo_moved(routes, x[:, :1].numel() * dtype.itemsize, *place, reverse=reverse)


@communicating_op("dtcp::left_halo", moves=_halo_moves)
def _halo(
    x: Tensor, route: Tensor, onward: Tensor, length: int, group: str, dtype: torch.dtype
) -> Tensor:
    """The tokens left of each segment, from whoever holds them: [B, length, C].

    Args:
        x: in the dtype of sums, that of its gradient.
        dtype: of what travels, in which x has no other values, and of what is returned.
    """
    axis = axis_of(group, x.device)
    send, receive = _hops(route)
    brought = exchange_tokens(x.to(dtype), Route(send, receive, length), axis)
    if not hands_on(onward):
        return brought
    send, receive = _hops(onward)
    return brought + exchange_tokens(brought, Route(send, receive, length), axis)


@_halo.register_fake
def _(
    x: Tensor, route: Tensor, onward: Tensor, length: int, group: str, dtype: torch.dtype
) -> Tensor:
    return x.new_empty(x.shape[0], length, *x.shape[2:], dtype=dtype)


@communicating_op("dtcp::left_halo_backward", moves=_halo_backward_moves)
def _halo_backward(grad: Tensor, route: Tensor, onward: Tensor, length: int, group: str) -> Tensor:
    """The gradients home, zero elsewhere: [B, L, C] in the dtype of sums."""
    axis = axis_of(group, grad.device)
    grad_inside, wide = grad, accumulation(grad.dtype)
    if hands_on(onward):
        send, receive = _hops(onward)
        inside = exchange_tokens(grad, Route(receive, send, grad.shape[1]), axis)
        grad_inside = (grad.to(wide) + inside.to(wide)).to(grad.dtype)
    send, receive = _hops(route)
    return exchange_tokens(grad_inside, Route(receive, send, length), axis).to(wide)


@_halo_backward.register_fake
def _(grad: Tensor, route: Tensor, onward: Tensor, length: int, group: str) -> Tensor:
    wide = accumulation(grad.dtype)
    return grad.new_empty(grad.shape[0], length, *grad.shape[2:], dtype=wide)


def _keep(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, route, onward, _, ctx.group, _ = inputs
    ctx.length = x.shape[1]
    ctx.save_for_backward(route, onward)


def _home(ctx, grad):  # type: ignore[no-untyped-def]
    home = _halo_backward(grad, *ctx.saved_tensors, ctx.length, ctx.group)
    return home, None, None, None, None, None


_halo.register_autograd(_home, setup_context=_keep)


def _hops(route: Tensor) -> tuple[tuple[tuple[int, int, int], ...], ...]:
    return tuple(tuple((r, a, b) for r, a, b in side if a < b) for side in route.tolist())
