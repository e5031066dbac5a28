"""fla-core's kernels of the gated delta rule, where there is a GPU for them.

Called below fla's public functions, which switch the compiler off and know one row at a time.
Segments are rows, and documents are written into the decay: a first token keeps exp(-32) of what
came before, so no kernel reads document lengths from the device, and no packing is a new graph.

Written against fla-core 0.6.
"""

import importlib.util
import warnings
from functools import cache
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from dtcp.kernels.delta_rule import reference as delta_rule
from dtcp.kernels.delta_rule.reference import Carry, InputGradients, Inputs

FORGET = -32.0
"""Log-decay at a document's start: 1e-14 is left, and sums over a chunk keep their digits."""

_CHUNK = 64
_TO_LOG2 = 1.4426950408889634


class DeltaKernel(Protocol):
    """A pair of functions as in delta_rule.py."""

    def forward(self, x: Inputs, carry: Carry | None) -> tuple[Tensor, Tensor]: ...

    def backward(
        self, x: Inputs, grad_out: Tensor, state: Tensor, carry: Carry | None
    ) -> InputGradients: ...


def delta_kernel(x: Inputs) -> DeltaKernel:
    """fla's kernels on GPUs that they run on, in dtypes that they take; else the reference."""
    if not x.v.is_cuda or x.v.dtype == torch.float64 or x.k.shape[-1] > 256:
        return delta_rule
    if x.g.ndim == 4:
        _say_channels()
        return delta_rule
    if torch.cuda.get_device_capability(x.v.device) < (8, 0) or not _has_fla():
        return delta_rule
    return FlaKernel()


class Prepared(NamedTuple):
    """What both passes compute first."""

    x: Inputs  # whole chunks, in one dtype
    decay: Tensor  # [R, T, H], running sum of log2-decay in each chunk
    w: Tensor  # [R, T, H, K]
    u: Tensor  # [R, T, H, V]
    solved: Tensor  # [R, T, H, C]


class FlaKernel:
    """The rule by fla's kernels; states and summaries are fp32."""

    def forward(self, x: Inputs, carry: Carry | None) -> tuple[Tensor, Tensor]:
        from fla.ops.common.chunk_delta_h import chunk_gated_delta_rule_fwd_h
        from fla.ops.common.chunk_o import chunk_fwd_o

        length, at = x.v.shape[1], self._prepare(x)
        state = _zero_state(at) if carry is None else carry(self._summary(at))
        h, new, _ = chunk_gated_delta_rule_fwd_h(
            k=at.x.k, w=at.w, u=at.u, g=at.decay, initial_state=state
        )
        out = chunk_fwd_o(q=at.x.q, k=at.x.k, v=new, h=h, g=at.decay, scale=1.0)
        return out[:, :length].to(x.v.dtype), state

    def backward(
        self, x: Inputs, grad_out: Tensor, state: Tensor, carry: Carry | None
    ) -> InputGradients:
        from fla.ops.common.chunk_delta_h import (
            chunk_gated_delta_rule_bwd_dhu,
            chunk_gated_delta_rule_fwd_h,
        )
        from fla.ops.common.chunk_o import chunk_bwd_dv_local
        from fla.ops.gated_delta_rule.wy_fast import prepare_wy_repr_bwd
        from fla.ops.utils import chunk_local_cumsum

        at, length = self._prepare(x), x.v.shape[1]
        q, k, v, _, beta, _ = at.x
        grad = _whole_chunks(grad_out.to(v.dtype))
        h, new, _ = chunk_gated_delta_rule_fwd_h(
            k=k, w=at.w, u=at.u, g=at.decay, initial_state=state
        )
        d_new = chunk_bwd_dv_local(q=q, k=k, g=at.decay, do=grad, scale=1.0)
        after = None if carry is None else carry(self._summary_backward(at, grad, d_new))
        d_h, _, d_new = chunk_gated_delta_rule_bwd_dhu(
            q=q,
            k=k,
            w=at.w,
            g=at.decay,
            h0=state,
            dht=after,
            do=grad,
            dv=d_new,
            scale=1.0,
        )
        dq, dk, dw, dg = _inside_chunks(at, new=new, h=h, grad=grad, d_h=d_h, d_new=d_new)
        dk_write, dv, d_beta, dg_write = prepare_wy_repr_bwd(
            k=k, v=v, beta=beta, g=at.decay, A=at.solved, dw=dw, du=d_new
        )
        dg = chunk_local_cumsum(dg + dg_write, chunk_size=_CHUNK, reverse=True)
        dg = dg[:, :length].masked_fill(x.starts[..., None] != 0, 0)
        found = (dq[:, :length], (dk + dk_write)[:, :length], dv[:, :length], dg)
        grads = (*found, d_beta[:, :length])
        return InputGradients(*(g.to(like.dtype) for g, like in zip(grads, x, strict=False)))

    def _prepare(self, x: Inputs) -> Prepared:
        from fla.ops.gated_delta_rule.chunk_fwd import chunk_gated_delta_rule_fwd_intra
        from fla.ops.utils import chunk_local_cumsum

        g = x.g.float().masked_fill(x.starts[..., None] != 0, FORGET)
        # What fla does not check: all in one dtype and contiguous, or gradients are wrong.
        q, k, v, beta = (_whole_chunks(part.to(x.v.dtype)) for part in (x.q, x.k, x.v, x.beta))
        decay = chunk_local_cumsum(_whole_chunks(g), chunk_size=_CHUNK, scale=_TO_LOG2)
        w, u, solved = chunk_gated_delta_rule_fwd_intra(k=k, v=v, g=decay, beta=beta)
        return Prepared(Inputs(q, k, v, g, beta, x.starts), decay, w, u, solved)

    def _summary(self, at: Prepared) -> Tensor:
        """[M | b] of every row, in one launch."""
        from fla.ops.cp.chunk_fwd import chunk_cp_fwd_h

        found, rows = _empty_summary(at), len(at.u)
        ends = torch.arange(rows + 1, device=at.u.device) * at.u.shape[1]
        k, w, u, g = (_one_row(part) for part in (at.x.k, at.w, at.u, at.decay))
        chunk_cp_fwd_h(k=k, w=w, u=u, hm=found, g=g, cu_seqlens=ends, multi_seqs=True)
        return _map_first(found, at.u.shape[-1])

    def _summary_backward(self, at: Prepared, grad: Tensor, d_new: Tensor) -> Tensor:
        """[M^T | b] of every row."""
        from fla.ops.cp.chunk_bwd import chunk_cp_bwd_dh

        found = _empty_summary(at)
        ends = torch.arange(len(found) + 1, device=at.u.device) * at.u.shape[1]
        parts = (at.x.q, at.x.k, at.w, grad, d_new, at.decay)
        q, k, w, do, dv, g = (_one_row(part) for part in parts)
        for row in range(len(found)):
            chunk_cp_bwd_dh(
                q=q,
                k=k,
                w=w,
                do=do,
                dv=dv,
                dhm=found[row],
                g=g,
                scale=1.0,
                cu_seqlens=ends[row : row + 2],
            )
        return _map_first(found, at.u.shape[-1])


def _inside_chunks(
    at: Prepared, *, new: Tensor, h: Tensor, grad: Tensor, d_h: Tensor, d_new: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, w and of the running sum of the decay, given those of the states.

    Triton 3.4 to 3.7.0 miscompiles fla's kernel on Hopper, and fla refuses to run it there
    (flash-linear-attention issue 640): plain matmuls then do what it does.
    """
    from fla.ops.common import chunk_o

    guarded = chunk_o.IS_NVIDIA_HOPPER and chunk_o.TRITON_ABOVE_3_4_0
    if guarded and not chunk_o.TRITON_ABOVE_3_7_1:
        return inside_chunks_in_torch(at, new=new, h=h, grad=grad, d_h=d_h, d_new=d_new)
    found = chunk_o.chunk_bwd_dqkwg(
        q=at.x.q,
        k=at.x.k,
        v=new,
        w=at.w,
        g=at.decay,
        h=h,
        dv=d_new,
        do=grad,
        dh=d_h,
        scale=1.0,
    )
    return cast("tuple[Tensor, Tensor, Tensor, Tensor]", found)


def inside_chunks_in_torch(
    at: Prepared, *, new: Tensor, h: Tensor, grad: Tensor, d_h: Tensor, d_new: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As fla's chunk_bwd_dqkwg, in batched products over all chunks at once."""
    heads, groups = at.u.shape[2], at.x.k.shape[2]
    q, k = (_by_chunk(part.repeat_interleave(heads // groups, dim=2)) for part in at.x[:2])
    new, grad, d_new = (_by_chunk(part) for part in (new, grad, d_new))
    h, d_h = (part.transpose(1, 2).float() for part in (h, d_h))  # [R, H, N, K, V]
    total = _by_chunk(at.decay[..., None])  # [R, H, N, C, 1]
    enter, leave = total.exp2(), (total[..., -1:, :] - total).exp2()
    decay = (total - total.mT).masked_fill(~_lower(total), -torch.inf).exp2()

    d_entering, d_leaving = grad @ h.mT, new @ d_h.mT
    d_score = (grad @ new.mT) * decay
    dq = d_score @ k + enter * d_entering
    dk = d_score.mT @ q + leave * d_leaving
    dw = -(d_new @ h.mT)
    pairs = d_score * (q @ k.mT)
    entering, leaving = (enter * d_entering * q).sum(-1), (leave * d_leaving * k).sum(-1)
    dg = pairs.sum(-1) - pairs.sum(-2) + entering - leaving
    through = (h * d_h).sum((-2, -1)) * enter[..., -1, 0]
    dg[..., -1] += through + leaving.sum(-1)
    dq, dk, dw, dg = (_by_token(part) for part in (dq, dk, dw, dg[..., None]))
    dq, dk = (part.unflatten(2, (groups, -1)).sum(3) for part in (dq, dk))
    dtype = at.u.dtype
    # Contiguous: the kernels that read these assume it.
    return (
        dq.to(dtype).contiguous(),
        dk.to(dtype).contiguous(),
        dw.to(dtype).contiguous(),
        dg[..., 0].contiguous(),
    )


@cache
def _has_fla() -> bool:
    """Whether fla is installed; says once what is missed without it."""
    found = importlib.util.find_spec("fla") is not None
    if not found:
        warnings.warn(
            "The gated delta rule runs on torch's own matmuls, which are slower on a GPU than "
            "fla-core's kernels: pip install fla-core.",
            stacklevel=2,
        )
    return found


@cache
def _say_channels() -> None:
    """Says once that decays by channel have no kernel here."""
    warnings.warn(
        "The delta rule with a decay for each key channel runs on torch's own matmuls: fla-core's "
        "kernels are used for a decay a head only.",
        stacklevel=2,
    )


def _whole_chunks(x: Tensor) -> Tensor:
    """[R, T, ...] with zeros after it up to whole chunks, contiguous."""
    missing = -x.shape[1] % _CHUNK
    return F.pad(x, (0, 0) * (x.ndim - 2) + (0, missing)).contiguous()


def _one_row(x: Tensor) -> Tensor:
    return x.contiguous().flatten(0, 1)[None]


def _empty_summary(at: Prepared) -> Tensor:
    rows, _, heads, key_dim = at.w.shape
    return at.u.new_zeros(rows, heads, key_dim, key_dim + at.u.shape[-1], dtype=torch.float32)


def _map_first(found: Tensor, value_dim: int) -> Tensor:
    """fla's [b | M] as [M | b]."""
    state, transition = found.split((value_dim, found.shape[-1] - value_dim), dim=-1)
    return torch.cat((transition, state), dim=-1)


def _zero_state(at: Prepared) -> Tensor:
    rows, _, heads, key_dim = at.w.shape
    return at.u.new_zeros(rows, heads, key_dim, at.u.shape[-1], dtype=torch.float32)


def _by_chunk(x: Tensor) -> Tensor:
    """[R, T, H, D] -> [R, H, N, C, D], fp32."""
    return x.transpose(1, 2).unflatten(2, (-1, _CHUNK)).float()


def _by_token(x: Tensor) -> Tensor:
    """[R, H, N, C, D] -> [R, T, H, D]."""
    return x.flatten(2, 3).transpose(1, 2)


def _lower(x: Tensor) -> Tensor:
    chunk = x.shape[-2]
    return torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).tril()
