"""What the interval kernels share: tensors and tiles as a kernel takes them, scores, block runs.

A query's interval of positions is a run of keys once it is looked up in the keys' positions
(interval_runs.py). From then on everything is an index, of a query or of a key:

    begin        full_begin           full_stop        stop
      |  some see    |  every query sees  |   some see   |

A query that sees none of these keys has begin NOWHERE and stop 0, so that minima and maxima over
a tile pass it by, and no run is full where one is in the tile.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

NOWHERE = tl.constexpr(1 << 30)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


class View(NamedTuple):
    """A tensor [B, tokens, heads, width], or the first of these dims, of any strides."""

    at: Any  # a tensor on the host, a pointer in a kernel
    strides: tuple[int, ...]

    @classmethod
    def of(cls, x: Tensor) -> "View":
        return cls(x, x.stride())


class Runs(NamedTuple):
    """The run of keys that each query sees."""

    begin: View  # [B, L] int32
    stop: View  # [B, L] int32


class How(NamedTuple):
    """Of the softmax, as numbers of the launch."""

    scale: float
    softcap: float  # anything where there is none


class Shape(NamedTuple):
    """What a kernel is compiled for; blocks are powers of two, at least 16."""

    key_dim: Any
    value_dim: Any
    key_block: Any  # columns that hold key_dim
    value_block: Any
    queries: Any  # a tile
    keys: Any
    capped: Any

    @classmethod
    def of(cls, k: Tensor, v: Tensor, tile: tuple[int, int], softcap: float) -> "Shape":
        dims = (k.shape[-1], v.shape[-1])
        blocks = (max(16, triton.next_power_of_2(dim)) for dim in dims)
        return cls(*(tl.constexpr(x) for x in (*dims, *blocks, *tile, softcap != 0.0)))


class Place(NamedTuple):
    """Some tokens of one head, in a kernel."""

    batch: Any
    head: Any
    first: Any
    rows: Any  # 0, 1, .. as many as a tile has


@triton.jit
def row_pointers(x, place):
    """One pointer a token; only here may offsets pass 2**31."""
    at = x.at + place.batch.to(tl.int64) * x.strides[0] + place.head.to(tl.int64) * x.strides[2]
    return at + place.first.to(tl.int64) * x.strides[1] + place.rows * x.strides[1]


@triton.jit
def pointers(x, place, BLOCK: tl.constexpr):
    """[rows, BLOCK] pointers."""
    column = tl.arange(0, BLOCK)
    return row_pointers(x, place)[:, None] + (column * x.strides[3])[None, :]


@triton.jit
def within(place, stop, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """[rows, BLOCK] bool: before token `stop` and column WIDTH."""
    return (place.first + place.rows < stop)[:, None] & (tl.arange(0, BLOCK) < WIDTH)[None, :]


@triton.jit
def load_rows(x, place, stop, WIDTH: tl.constexpr, BLOCK: tl.constexpr, CUT: tl.constexpr):
    """[rows, BLOCK], with zeros past WIDTH and, if CUT, from token `stop` on."""
    if CUT:
        found = tl.load(pointers(x, place, BLOCK), within(place, stop, WIDTH, BLOCK), other=0.0)
    elif WIDTH != BLOCK:
        inside = (tl.arange(0, BLOCK) < WIDTH)[None, :]
        found = tl.load(pointers(x, place, BLOCK), mask=inside, other=0.0)
    else:
        found = tl.load(pointers(x, place, BLOCK))
    return found


@triton.jit
def add_rows(x, found, place, stop, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Add [rows, BLOCK] to x in place."""
    at, inside = pointers(x, place, BLOCK), within(place, stop, WIDTH, BLOCK)
    tl.store(at, tl.load(at, mask=inside, other=0.0) + found, mask=inside)


@triton.jit
def run_ends(x, place, length):
    """One end of the runs of some queries; past the last query, that of the last."""
    return tl.load(
        x.at + place.batch * x.strides[0] + tl.minimum(place.first + place.rows, length - 1)
    )


@triton.jit
def block_run(begin, full_begin, full_stop, stop, BLOCK: tl.constexpr):
    """Cut [begin, stop) into blocks: those inside the full run are whole, and need no mask.

    Returns how many these are, where the first of them starts, and how many others there are,
    left of them and then right of them; `masked_block` says where those start.
    """
    full_begin = begin + tl.cdiv(tl.maximum(full_begin - begin, 0), BLOCK) * BLOCK
    full = tl.maximum(full_stop - full_begin, 0) // BLOCK
    full_begin = tl.where(full > 0, full_begin, begin)
    right = tl.maximum(stop - full_begin - full * BLOCK, 0)
    return full, full_begin, (full_begin - begin) // BLOCK + tl.cdiv(right, BLOCK)


@triton.jit
def masked_block(index, begin, full_begin, full, BLOCK: tl.constexpr):
    """Where the index-th block outside of the full run starts."""
    start = begin + index * BLOCK
    return tl.where(start < full_begin, start, start + full * BLOCK)


@triton.jit
def scores_of(products, how, CAPPED: tl.constexpr):
    """Products of queries and keys -> scores in units of log 2; tanh of the score over the cap."""
    if CAPPED:
        # tanh, which the interpreter has not: off by one rounding of 1 at most.
        ratio = 2.0 * tl.sigmoid(2.0 * how.scale / how.softcap * products) - 1.0
        scores = how.softcap * LOG2_E * ratio
    else:
        ratio = products
        scores = products * (how.scale * LOG2_E)
    return scores, ratio
