"""Where neighbouring entries of long rows differ: found in one pass, with nothing as long as a row.

What is known of the tokens of a row sometimes comes as a number for each: documents, position ids,
types. Each entry is compared with the one before it, block by block: the answers of a block stay in
the cache until they have been looked through, and no memory is taken for all of them.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dtcp.sequence.partition import Ints

BLOCK = 1 << 16
"""Entries that are compared at once: half a megabyte, which a core's own cache holds."""


def where_neighbours(compare: np.ufunc, x: NDArray[np.generic]) -> Ints:
    """Indices of the entries for which compare(entry, the one before it) holds, ascending.

    Args:
        compare: np.not_equal, np.less_equal, ...
        x: [N]; entries from 1 on are compared.
    """
    indices, count = [], len(x)
    out = np.empty(min(BLOCK, max(count - 1, 0)), dtype=bool)
    for start in range(1, count, BLOCK):
        stop = min(start + BLOCK, count)
        holds = out[: stop - start]
        compare(x[start:stop], x[start - 1 : stop - 1], out=holds)
        indices.append(holds.nonzero()[0] + start)
    return np.concatenate(indices) if indices else np.zeros(0, dtype=np.int64)


def places_after(compare: np.ufunc, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """(row, column) of the entries for which compare(entry, the one before it) holds, in order.

    Args:
        compare: np.not_equal, np.less_equal, ...
        numbers: [B, N]; columns from 1 on are compared.
    """
    numbers = numbers.detach().cpu()
    array = (numbers.float() if numbers.dtype == torch.bfloat16 else numbers).numpy()
    columns = [where_neighbours(compare, row) for row in array]
    row = np.arange(len(columns)).repeat([len(each) for each in columns])
    place = np.concatenate(columns) if columns else np.zeros(0, dtype=np.int64)
    return torch.from_numpy(row), torch.from_numpy(place)


def starts_of_equal(x: NDArray[np.generic]) -> Ints:
    """Where each stretch of equal numbers starts: [groups]."""
    changes = where_neighbours(np.not_equal, x)
    return np.concatenate(([0], changes)) if len(x) else changes
