"""What a rank that is played has of a module's tensors, held against those of one device."""

import torch
from torch import Tensor

from dtcp.parallelize.plans.stand_in_run import StandInRun
from dtcp.parallelize.tensor_parallel import Segment


class NotSplitError(Exception):
    """A module has no parts for the ranks of tp."""


def part_of_rank(x: Tensor, dim: int, rank: int, tp: int) -> Tensor:
    """What a rank has of a tensor by its heads or channels, which it may share."""
    whole = Segment(x.shape[dim], x.shape[dim])
    if not whole.divides(tp):
        raise NotSplitError
    return x.narrow(dim, whole.start(tp, rank), whole.local(tp))


def nearly_equal(x: Tensor, y: Tensor) -> bool:
    """Whether two runs gave the same."""
    # Not equal to the bit: the last channels of a vector are computed in another way.
    return x.shape == y.shape and torch.allclose(x, y, rtol=1e-5)


def same_arguments(run: StandInRun, whole: StandInRun, rank: int, tp: int) -> bool:
    """Whether attention is called in the same way, with what is for each head in parts."""
    if run.arguments.keys() != whole.arguments.keys():
        return False
    for name, x in run.arguments.items():
        y = whole.arguments[name]
        if isinstance(x, Tensor) and isinstance(y, Tensor):
            by_head = y.shape[:1] == whole.operands[0].shape[1:2]
            if not nearly_equal(x, part_of_rank(y, 0, rank, tp) if by_head else y):
                return False
        elif isinstance(x, int | float | str | bool | None) and x != y:
            return False
    return True


def kind_of_part(x: Tensor, y: Tensor, rank: int, tp: int) -> str | None:
    """Whether x is all of y, its heads or its channels of a rank; None if it is neither."""
    if x.shape == y.shape:
        return "whole" if nearly_equal(x, y) else None
    dims = [dim for dim in range(y.ndim) if x.shape[dim] != y.shape[dim]]
    if (
        x.ndim != y.ndim
        or len(dims) != 1
        or not nearly_equal(x, part_of_rank(y, dims[0], rank, tp))
    ):
        return None
    return "channels" if dims[0] == y.ndim - 1 else "heads"
