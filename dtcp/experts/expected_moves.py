"""What a layer of experts moves where routers choose all experts alike, by its sizes alone.

The ops say what one batch moves, from its counts (moves.py). A plan has no batch: here are the
counts that are expected, and the same formulas of them.
"""

from dataclasses import dataclass, replace
from math import comb

from dtcp.distributed.moves import Moved, Moves
from dtcp.experts.moves import COUNT, rows_moved


@dataclass(frozen=True)
class ExpertSizes:
    """A layer of experts and the tokens of one rank.

    Args:
        num_tokens: that this rank routes: of those that tp's ranks hold in common, its part.
        dim: of a token's hidden state.
        top_k: experts of a token, all different.
        size: bytes of a number of a hidden state.
        weight_size: bytes of a weight.
    """

    num_tokens: int
    dim: int
    num_experts: int
    top_k: int
    size: int = 2
    weight_size: int = 4


def expected_moves(
    sizes: ExpertSizes, num_ranks: int, *, rank: int = 0, ranks_per_node: int = 0
) -> Moves:
    """What AllToAllExchange moves between the ranks of ep, or NodeExchange where there are nodes.

    Args:
        ranks_per_node: neighbours on ep that are on one machine, as of ExpertParallel.
    Returns:
        bytes by rank of ep, of one forward and one backward pass.
    """
    if ranks_per_node in (0, 1, num_ranks):
        return _straight(sizes, num_ranks, rank)
    place, node = rank % ranks_per_node, rank // ranks_per_node
    num_nodes = num_ranks // ranks_per_node
    tokens = round(tokens_per_node(sizes, num_nodes))
    rows = [tokens] * num_nodes
    row = sizes.dim * sizes.size
    words = sizes.top_k * (COUNT + sizes.weight_size)
    out, back = (rows_moved(rows, rows, bytes_, node) for bytes_ in (row + words, row))
    # Gradients of weights go home beside those of hidden states; those of numbers there are none.
    grads = rows_moved(rows, rows, row + sizes.top_k * sizes.weight_size, node)
    counts = Moved.alike(2 * COUNT, num_nodes, node)
    peers = [other * ranks_per_node + place for other in range(num_nodes)]
    # All that the ranks of this place send here is as much as one of them has.
    inside = _straight(
        replace(sizes, num_experts=sizes.num_experts // num_nodes), ranks_per_node, place,
        faults=num_nodes,
    )  # fmt: skip
    near = [node * ranks_per_node + other for other in range(ranks_per_node)]
    return Moves(
        _placed(counts + out + back, peers, num_ranks) + _placed(inside.forward, near, num_ranks),
        _placed(back + grads, peers, num_ranks) + _placed(inside.backward, near, num_ranks),
    )


def tokens_per_node(sizes: ExpertSizes, num_nodes: int) -> float:
    """Tokens of this rank that have chosen an expert of one node, where all are chosen alike."""
    elsewhere = sizes.num_experts - sizes.num_experts // num_nodes
    none = comb(elsewhere, sizes.top_k) / comb(sizes.num_experts, sizes.top_k)
    return sizes.num_tokens * (1 - none)


def _straight(sizes: ExpertSizes, num_ranks: int, rank: int, *, faults: int = 1) -> Moves:
    choices = sizes.num_tokens * sizes.top_k
    send = [choices // num_ranks + (peer < choices % num_ranks) for peer in range(num_ranks)]
    receive = [send[rank]] * num_ranks
    row = sizes.dim * sizes.size
    out, home = rows_moved(send, receive, row, rank), rows_moved(receive, send, row, rank)
    per_rank = sizes.num_experts // num_ranks + faults
    return Moves(Moved.alike(per_rank * COUNT, num_ranks, rank) + out + home, out + home)


def _placed(moved: Moved, peers: list[int], num_ranks: int) -> Moved:
    """What moves between some ranks of ep, by their places among all."""
    sent, received = [0] * num_ranks, [0] * num_ranks
    for peer, out, back in zip(peers, moved.sent, moved.received, strict=True):
        sent[peer], received[peer] = out, back
    return replace(moved, sent=tuple(sent), received=tuple(received))
