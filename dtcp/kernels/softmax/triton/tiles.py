"""What the kernels share: tiles of tokens as a kernel loads them, scores, ranges cut into blocks.

A query's interval of token indices becomes a range of keys once ranges.py has looked it up. From
then on everything is an index of a query or of a key:

    begin        full_begin           full_stop        stop
      |  partial   |        full           |  partial   |

A query that sees none of these keys has begin NO_KEY and stop 0, so that minima and maxima over a
tile ignore it, and a tile that holds one has no full part.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from dtcp.kernels.triton_constants import LOG2_E
from dtcp.kernels.triton_support import StridedTensor

NO_KEY = tl.constexpr(1 << 30)
"""Where the range of a query that sees no key begins."""


class RangeOperands(NamedTuple):
    """The range of keys that each query sees, as a kernel takes it."""

    begin: StridedTensor  # [B, L] int32
    stop: StridedTensor  # [B, L] int32


class ScoreOperands(NamedTuple):
    """SoftmaxParams as numbers of a launch; Triton refuses a kernel argument named `params`."""

    scale: float
    softcap: float  # not read where the kernel is compiled without a cap


class TileShape(NamedTuple):
    """What a kernel is compiled for; `*_block` and tiles are powers of two, at least 16."""

    key_dim: Any
    value_dim: Any
    key_block: Any  # columns that hold key_dim
    value_block: Any  # columns that hold value_dim
    queries: Any  # per tile
    keys: Any  # per tile
    capped: Any
    biased: Any  # said, since Triton 3.6 cannot ask a tuple that holds None whether it is None

    @classmethod
    def of(
        cls, k: Tensor, v: Tensor, tile: tuple[int, int], softcap: float, *, biased: bool
    ) -> "TileShape":
        dims = (k.shape[-1], v.shape[-1])
        blocks = (max(16, triton.next_power_of_2(dim)) for dim in dims)
        return cls(*(tl.constexpr(x) for x in (*dims, *blocks, *tile, softcap != 0.0, biased)))


class TokenTile(NamedTuple):
    """Neighbouring tokens of one head, in a kernel."""

    batch: Any
    head: Any
    first: Any
    rows: Any  # 0, 1, .. up to the number of tokens in the tile


@triton.jit
def token_pointers(x, tile):
    """One pointer per token, [rows]. Offsets may pass 2**31, in any layout even inside a tile."""
    base = (
        x.pointer + tile.batch.to(tl.int64) * x.strides[0] + tile.head.to(tl.int64) * x.strides[2]
    )
    return base + tile.first.to(tl.int64) * x.strides[1] + tile.rows.to(tl.int64) * x.strides[1]


@triton.jit
def channel_pointers(x, tile, BLOCK: tl.constexpr):
    """One pointer per token and channel, [rows, BLOCK]."""
    column = tl.arange(0, BLOCK).to(tl.int64)
    return token_pointers(x, tile)[:, None] + (column * x.strides[3])[None, :]


@triton.jit
def inside(tile, stop, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """[rows, BLOCK] bool: before token `stop` and column WIDTH."""
    return (tile.first + tile.rows < stop)[:, None] & (tl.arange(0, BLOCK) < WIDTH)[None, :]


@triton.jit
def load_tile(x, tile, stop, WIDTH: tl.constexpr, BLOCK: tl.constexpr, CUT: tl.constexpr):
    """[rows, BLOCK], with zeros past column WIDTH and, if CUT, from token `stop` on."""
    if CUT:
        mask = inside(tile, stop, WIDTH, BLOCK)
        values = tl.load(channel_pointers(x, tile, BLOCK), mask, other=0.0)
    elif WIDTH != BLOCK:
        columns = (tl.arange(0, BLOCK) < WIDTH)[None, :]
        values = tl.load(channel_pointers(x, tile, BLOCK), mask=columns, other=0.0)
    else:
        values = tl.load(channel_pointers(x, tile, BLOCK))
    return values


@triton.jit
def add_to_tile(x, values, tile, stop, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Add values [rows, BLOCK] to x in place."""
    pointers, mask = channel_pointers(x, tile, BLOCK), inside(tile, stop, WIDTH, BLOCK)
    tl.store(pointers, tl.load(pointers, mask=mask, other=0.0) + values, mask=mask)


@triton.jit
def range_ends(x, tile, length):
    """Begin or stop of each query's range, [rows]; past the last query, that of the last one."""
    query = tl.minimum(tile.first + tile.rows, length - 1)
    return tl.load(x.pointer + tile.batch.to(tl.int64) * x.strides[0] + query)


@triton.jit
def cut_into_blocks(begin, full_begin, full_stop, stop, BLOCK: tl.constexpr):
    """Cut [begin, stop) into blocks; those inside the full part need no mask.

    Returns how many blocks are full, where the first of them starts, and how many are partial:
    first those to the left of the full ones, then those to the right. `partial_block` says where
    the partial ones start.
    """
    full_begin = begin + tl.cdiv(tl.maximum(full_begin - begin, 0), BLOCK) * BLOCK
    full = tl.maximum(full_stop - full_begin, 0) // BLOCK
    full_begin = tl.where(full > 0, full_begin, begin)
    right = tl.maximum(stop - full_begin - full * BLOCK, 0)
    return full, full_begin, (full_begin - begin) // BLOCK + tl.cdiv(right, BLOCK)


@triton.jit
def partial_block(index, begin, full_begin, full, BLOCK: tl.constexpr):
    """Where the index-th partial block starts."""
    start = begin + index * BLOCK
    return tl.where(start < full_begin, start, start + full * BLOCK)


@triton.jit
def scores_of(products, score_params, CAPPED: tl.constexpr):
    """Scores in units of log 2, and, where capped, tanh(score / softcap)."""
    if CAPPED:
        # Triton's interpreter has no tanh; this differs by one rounding of 1 at most.
        tanh = 2.0 * tl.sigmoid(2.0 * score_params.scale / score_params.softcap * products) - 1.0
        scores = score_params.softcap * LOG2_E * tanh
    else:
        tanh = products
        scores = products * (score_params.scale * LOG2_E)
    return scores, tanh
