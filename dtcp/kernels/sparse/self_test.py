"""A check of a sparse backend against the reference on the device it will run on: once."""

from collections.abc import Callable
from enum import Enum
from functools import partial

import torch
from torch import Tensor

from dtcp.kernels.faults import excess, fault_in, largest_error, lse_error, token_error
from dtcp.kernels.sparse.read_ranges import entry_runs, key_runs
from dtcp.kernels.sparse.types import NOWHERE, Sight, SparseKernel, SparseKeys

ROWS, QUERIES, WINDOW, ENTRIES, SELECTED, HEADS = 2, 93, 24, 203, 99, 64
"""No whole blocks of any of them."""
SECOND = 50
"""Where the second row's second document starts; the first row is one document."""


class SparseReads(Enum):
    """What queries read besides their windows; a kernel is compiled for each by itself."""

    WINDOW = "windows of keys"
    RUNS = "runs of entries"
    SELECTED = "selected entries"

    @classmethod
    def of(cls, keys: SparseKeys) -> "SparseReads":
        if keys.entries is None:
            return cls.WINDOW
        # What may select as many entries as there are selects all that a query sees.
        all_seen = keys.selected is None or keys.selected.shape[-1] >= keys.entries.shape[1]
        return cls.RUNS if all_seen else cls.SELECTED


def fault_of_sparse(
    make_kernel: Callable[[], SparseKernel],
    reference: SparseKernel,
    dtype: torch.dtype,
    device: torch.device,
    width: int,
    *,
    value_dim: int | None = None,
    heads: int = HEADS,
    reads: SparseReads = SparseReads.SELECTED,
    has_sink: bool = True,
) -> str | None:
    """What is wrong with the results of a kernel, in a few words; None if they are right.

    Args:
        value_dim: channels of the width that are values; None for all.
    """

    def check() -> str | None:
        widths = (width, value_dim)
        q, keys, sink = sparse_problem(dtype, device, *widths, heads=heads, reads=reads)
        given = q, keys, sink if has_sink else None
        return excess(reads.value, _errors(make_kernel(), reference, *given))

    return fault_in(check, device)


def sparse_problem(
    dtype: torch.dtype,
    device: torch.device,
    width: int,
    value_dim: int | None = None,
    *,
    heads: int = HEADS,
    reads: SparseReads = SparseReads.SELECTED,
) -> tuple[Tensor, SparseKeys, Tensor]:
    """q, what it reads, and sinks: windows of raw keys, and entries."""
    generator = torch.Generator(device).manual_seed(0)
    noise = partial(torch.randn, generator=generator, device=device)
    q, keys, entries = (
        noise(ROWS, *shape).to(dtype)
        for shape in ((QUERIES, heads, width), (QUERIES, width), (ENTRIES, width))
    )
    selected = _selected(device) if reads is SparseReads.SELECTED else None
    read = (None if reads is SparseReads.WINDOW else entries, selected, _sight(reads, device))
    return q, SparseKeys(keys, *read, value_dim or width), noise(heads)


def _selected(device: torch.device) -> Tensor:
    """Every other entry for each query of a first document; some select fewer."""
    places = torch.arange(0, ENTRIES, 2, dtype=torch.int32, device=device)[:SELECTED]
    selected = places.expand(ROWS, QUERIES, SELECTED).clone()
    selected[:, ::3, SELECTED // 2 :] = -1
    selected[1, SECOND:] = -1
    return selected


def _sight(reads: SparseReads, device: torch.device) -> Sight:
    """Entries that are read in runs close along the documents, some nowhere; selected ones before.

    Padding ends the second row.
    """
    query = torch.arange(QUERIES).expand(ROWS, -1).contiguous()
    number = 0 if reads is SparseReads.WINDOW else ENTRIES
    closing = (torch.arange(number) * QUERIES // ENTRIES).expand(ROWS, -1).contiguous()
    if reads is SparseReads.SELECTED:
        closing.zero_()
    else:
        closing[:, 90:97] = NOWHERE
    first, last = 0 * query, query.clone()
    first[1, SECOND:] = SECOND
    last[1, -3:] = -1
    window_first = torch.maximum(query - WINDOW + 1, first)
    segments = [(0, QUERIES)]
    of_keys = key_runs(window_first, last, segments, 0)
    of_entries = entry_runs(first, last, closing, segments)
    tiles = torch.tensor([[[0, QUERIES, 0, QUERIES, 0, number]]]).expand(ROWS, -1, -1)
    tables = (window_first, first, last, query[0], closing, *of_keys, *of_entries)
    return Sight._make((*(x.to(device, torch.int32) for x in tables), tiles))


def _errors(
    kernel: SparseKernel, truth: SparseKernel, q: Tensor, keys: SparseKeys, sink: Tensor | None
) -> dict[str, float]:
    """Of out, lse and the gradients, by name."""
    scale, dtype, device = q.shape[-1] ** -0.5, q.dtype, q.device
    right_out, right_lse = truth.forward(q, keys, sink, scale)
    generator = torch.Generator(device).manual_seed(1)
    grad_out = torch.randn(right_out.shape, generator=generator, device=device).to(dtype)
    saved = (grad_out, q, keys, sink, right_out, right_lse, scale)
    out, lse = kernel.forward(q, keys, sink, scale)
    ours, right = kernel.backward(*saved), truth.backward(*saved)
    pairs = {"out": (out, right_out)}
    for name in right._fields:
        pair = getattr(ours, name), getattr(right, name)
        # What one of them alone has no gradient of is a fault, too.
        if any(x is not None for x in pair):
            pairs[f"d{name}"] = pair
    errors = {"lse": lse_error(lse, right_lse)}
    for name, pair in pairs.items():
        errors[name] = largest_error(*pair) if name == "dsink" else token_error(*pair)
    return errors
