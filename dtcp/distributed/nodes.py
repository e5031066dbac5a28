"""Which ranks of an axis share a node: neighbours, as many on each.

What several ranks of a node read may cross the network once, and be spread inside the node. Nobody
but the one who starts the ranks knows the nodes: torchrun's --nproc-per-node, or a person.
"""

from itertools import groupby
from math import lcm

import torch
from torch import Tensor
from torch import distributed as dist

from dtcp.sequence.arguments import check_ints


def check_ranks_per_node(subject: str, num_ranks: int, ranks_per_node: int) -> None:
    """Refuse nodes that do not divide an axis; 0: nobody has said what they are."""
    if ranks_per_node and num_ranks % ranks_per_node:
        raise ValueError(
            f"{subject} has equally many ranks of its axis on each node, got ranks_per_node="
            f"{ranks_per_node} with {num_ranks} ranks: give a divisor, or 0 for one tier."
        )


def check_same_nodes(
    ranks_per_node: int, device_type: str, group: dist.ProcessGroup | None = None
) -> None:
    """Refuse ranks that disagree on their nodes: their exchanges would not fit together.

    Args:
        group: all of its ranks call this; None for all ranks.
    """
    largest = torch.tensor([ranks_per_node, -ranks_per_node], device=device_type)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    most, least = int(largest[0]), -int(largest[1])
    if most != least:
        raise ValueError(
            f"Nodes have equally many ranks, and all ranks say the same, got ranks_per_node from "
            f"{least} to {most}: start as many on each machine, or give all the same number "
            f"(--dtcp.ranks_per_node)."
        )


def neighbours_on_axis(axis_ranks: Tensor, ranks_per_node: int) -> int:
    """How many neighbours of an axis share a node, where so many ranks of all do.

    Args:
        axis_ranks: [groups, n], the ranks of every group of the axis.
        ranks_per_node: of all ranks, 0 .. on the first node, as torchrun counts them; 0: not said.
    Raises:
        ValueError: groups that nodes cut into unequal parts.
    """
    check_ints("Nodes", least=0, ranks_per_node=ranks_per_node)
    if not ranks_per_node:
        return 0
    together = _together(axis_ranks, ranks_per_node)
    if len(together) > 1:
        raise ValueError(
            f"Each node has equally many neighbours of the axis cp, got ranks_per_node="
            f"{ranks_per_node}, which puts {sorted(together)} of its {axis_ranks.shape[1]} ranks "
            f"together: choose a cp * tp that fills whole nodes or divides one, or give the world "
            f"size (--dtcp.ranks_per_node) for one tier."
        )
    return together.pop()


def neighbours_on_cp(cp: int, tp: int, ranks_per_node: int) -> int:
    """The same of the axis cp beside tp, which is the faster one, before there is a mesh."""
    return neighbours_on_axis(_groups_of_cp(cp, tp, ranks_per_node), ranks_per_node)


def even_on_cp(cp: int, tp: int, ranks_per_node: int) -> bool:
    """Whether the same refuses nothing."""
    return len(_together(_groups_of_cp(cp, tp, ranks_per_node), ranks_per_node)) == 1


def _groups_of_cp(cp: int, tp: int, ranks_per_node: int) -> Tensor:
    """The ranks of every group, [groups, cp], until nodes and groups fall together again."""
    ranks = torch.arange(lcm(cp * tp, max(ranks_per_node, 1)))
    return ranks.view(-1, cp, tp).movedim(1, 2).flatten(0, 1)


def _together(axis_ranks: Tensor, ranks_per_node: int) -> set[int]:
    """How many neighbours share a node, here and there."""
    nodes = (axis_ranks // ranks_per_node).tolist()
    return {len(list(ranks)) for group in nodes for _, ranks in groupby(group)}


def even_neighbours(axis_ranks: Tensor, ranks_per_node: int) -> int:
    """The same where nothing is refused: 0 for groups that nodes cut into unequal parts.

    Args:
        axis_ranks, ranks_per_node: as of neighbours_on_axis.
    """
    nodes = axis_ranks // ranks_per_node
    size, run = nodes.shape[1], int((nodes[0] == nodes[0, 0]).sum())
    if size % run:
        return 0
    runs = nodes.view(-1, size // run, run)
    firsts = runs[..., 0].sort(-1).values
    is_even = (runs == runs[..., :1]).all() and (firsts[:, 1:] != firsts[:, :-1]).all()
    return run if is_even else 0
