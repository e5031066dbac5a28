"""A check of a backend against the reference on the device it will run on: once, some milliseconds.

It has the widths, dtype and kinds of mask that were asked for, so what it compiles is used later.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from dtcp.kernels.faults import excess, fault_in, largest_error, lse_error, token_error
from dtcp.kernels.softmax.block_ranges import block_ranges
from dtcp.kernels.softmax.calls import Call, CallKind, calls_of
from dtcp.kernels.softmax.demand import Demand
from dtcp.kernels.softmax.pieces import find_pieces
from dtcp.kernels.softmax.score_bias import PARTS, ScoreBias
from dtcp.kernels.softmax.types import (
    AttentionKernel,
    GradAccumulators,
    Keys,
    OnlineSoftmax,
    Queries,
    SavedForward,
    SoftmaxParams,
)

LENGTHS = (161, 291)
"""Queries and keys: more than one block of any kernel, and no whole number of them."""
ROWS, KV_HEADS = 2, 2

MakeKernel = Callable[[tuple[Call, ...] | None], AttentionKernel]


class Problem(NamedTuple):
    """Queries, keys, and the calls of a kernel that their mask comes to."""

    queries: Queries
    keys: Keys
    calls: tuple[Call, ...] | None
    grad_out: Tensor


def fault_of(make_kernel: MakeKernel, reference: AttentionKernel, demand: Demand) -> str | None:
    """What is wrong with the results of a kernel, in a few words; None if they are right."""

    def check() -> str | None:
        for name, first, last in _masks(demand):
            problem = _problem(first, last, demand)
            wrong = excess(name, _errors(make_kernel(problem.calls), reference, problem, demand))
            if wrong is not None:
                return wrong
        return None

    return fault_in(check, demand.device)


def _masks(demand: Demand) -> list[tuple[str, Tensor, Tensor]]:
    """First and last key of every query, for each kind of call that is asked for."""
    length, num_keys = LENGTHS
    query = torch.arange(length)
    # Under a diagonal, the queries are those of the last keys.
    token = query + (num_keys - length if demand.skewed else 0)
    masks_by_kind = {
        CallKind.RECTANGLE: (torch.zeros_like(query), torch.full_like(query, num_keys - 1)),
        CallKind.CAUSAL: (torch.zeros_like(query), token),
        CallKind.WINDOW: ((token - 63).clamp(min=0), token),
        # Blocks of tokens that see each other, among others that are causal.
        CallKind.INTERVAL: (query // 100 * 100, torch.where(query % 50 < 20, query | 15, query)),
    }
    masks = [(kind.value, *masks_by_kind[kind]) for kind in CallKind if kind in demand.kinds]
    if demand.packed:
        masks += [_documents(kind) for kind in CallKind if kind in demand.kinds]
    return masks


def _documents(kind: CallKind) -> tuple[str, Tensor, Tensor]:
    """Three documents, one of them a token; in between queries see nothing, and keys are unseen."""
    query = torch.arange(LENGTHS[0])
    one, nothing, last_one = query == 69, (query >= 70) & (query < 90), query >= 90
    first = torch.where(last_one, 110, 0).where(~one, 69)
    last = torch.where(last_one, query + 60, query)
    if kind is CallKind.RECTANGLE:
        last = torch.where(last_one, 249, 68).where(~one, 69)
    elif kind is CallKind.WINDOW:
        first = torch.maximum(first, last - 31)
    return f"documents, {kind.value}", first, last.masked_fill(nothing, -1)


def _problem(first: Tensor, last: Tensor, demand: Demand) -> Problem:
    length, num_keys = LENGTHS
    square = not demand.skewed and not demand.packed and demand.kinds <= {CallKind.CAUSAL}
    num_keys = length if square else num_keys
    first, last = (x.to(torch.int32).expand(ROWS, -1).contiguous() for x in (first, last))
    index = torch.arange(num_keys, dtype=torch.int32)
    table = find_pieces(first, last, index, tiles=0)
    calls = calls_of(table, batch=ROWS, length=length, num_keys=num_keys)
    if CallKind.INTERVAL in demand.kinds:
        calls = None
    device, dtype = demand.device, demand.dtypes[0]
    generator = torch.Generator(device).manual_seed(0)
    noise = partial(torch.randn, generator=generator, device=device)
    heads, (key, value) = demand.group * KV_HEADS, (demand.key_width, demand.value_width)
    # Rows inside of tokens, and keys beside values: as they arrive from other ranks.
    q, grad_out = (noise(ROWS, length, heads, width).to(dtype) for width in (key, value))
    rows = noise(num_keys, ROWS, KV_HEADS, key + value).to(dtype).transpose(0, 1)
    k, v = rows.split((key, value), dim=-1)
    return Problem(
        Queries(q, first.to(device), last.to(device), _bias(demand, noise)),
        Keys(k, v, index.to(device), block_ranges(first, last, index)),
        calls,
        grad_out,
    )


def _bias(demand: Demand, noise: Callable[..., Tensor]) -> ScoreBias | None:
    """Of what is asked for, reaching so far that some keys lie beyond."""
    if not demand.bias:
        return None
    length, heads = LENGTHS[0], demand.group * KV_HEADS
    made = {
        "table": noise(heads, 61),
        "slope": noise(heads) / 64,
        "relative": noise(ROWS, length, heads, 4).to(demand.dtypes[0]),
        "profiles": noise(4, 40) / 2,
    }
    parts = (made[name] if name in demand.bias else None for name in PARTS)
    index = torch.arange(length, dtype=torch.int32, device=demand.device)
    return ScoreBias(*parts, query_index=index, dtype=demand.dtypes[0])


def _errors(
    kernel: AttentionKernel, reference: AttentionKernel, problem: Problem, demand: Demand
) -> dict[str, float]:
    """Of out, lse and the gradients, by name; both kernels read the same out and lse."""
    params = SoftmaxParams(demand.key_width**-0.5, 20.0 if demand.softcap else 0.0)
    queries, keys = problem.queries, problem.keys
    value_width = keys.v.shape[-1]
    right, ours = (OnlineSoftmax.empty(queries.q, value_width) for _ in range(2))
    reference.attend(right, queries, keys, params)
    kernel.attend(ours, queries, keys, params)
    # As in a ring: out and lse of backward are over more keys than these, here over a sink's.
    sink = torch.linspace(-1, 1, queries.q.shape[2], device=queries.q.device)
    out, lse = right.finish(sink, queries.q.dtype)
    saved = SavedForward(problem.grad_out, out, lse)
    like = (queries.q, *keys[:2])
    sums = [GradAccumulators(*(lse.new_zeros(x.shape) for x in like)) for _ in "ab"]
    biases = [None if queries.bias is None else queries.bias.emptied() for _ in "ab"]
    for each, grads, bias in zip((reference, kernel), sums, biases, strict=True):
        each.attend_backward(grads, saved, queries._replace(bias=bias), keys, params)
    errors = {"out": token_error(ours.out, right.out), "lse": lse_error(ours.lse, right.lse)}
    for name, *pair in zip(("dq", "dk", "dv"), sums[1], sums[0], strict=True):
        errors[name] = token_error(*pair)
    if biases[0] is not None and biases[1] is not None:
        gradients = zip(PARTS, biases[1].gradients, biases[0].gradients, strict=True)
        errors |= {
            n: largest_error(a, b) for n, a, b in gradients if a is not None and b is not None
        }
    return errors
