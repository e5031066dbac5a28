"""What ranks of a node take in, worked out token by token, and sums over such ranks."""

import torch
from torch import distributed as dist


def of_node(number, rank, ranks_per_node):
    """The sum over the ranks of this one's node."""
    every = torch.zeros(dist.get_world_size(), dtype=torch.int64)
    every[rank] = number
    dist.all_reduce(every)
    return every.view(-1, ranks_per_node)[rank // ranks_per_node].sum()


def owners_and_starts(layout, lengths):
    """Of each token, the rank that holds it and the first token of its document.

    Padding behind the documents starts at itself.
    """
    owner, start = [0] * layout.seq_len, list(range(layout.seq_len))
    for rank in range(layout.num_shards):
        for token in layout.token_indices(rank).tolist():
            owner[token] = rank
    for number, length in enumerate(lengths):
        first = sum(lengths[:number])
        start[first : first + length] = [first] * length
    return owner, start
