"""How few keys any layout of equal tokens and work could have ranks bring."""

import numpy as np

from dtcp.sequence.documents import Documents


def fewest_keys(
    documents: Documents, num_shards: int, *, imbalance: float = 1.01, stride: int = 64
) -> float:
    """A lower bound, under a causal mask, of what `keys to bring` is for every layout.

    A rank reads of each document all that lies before its last token there. So what all ranks read
    of a document is, summed over depths, how many of them have a token beyond. Those have together
    all of its tokens beyond, as many tokens as so many ranks have, the rest of which cost no less
    than the cheapest ones of the row, and no more work than so many ranks may: that asks for a
    number of ranks.

    Args:
        documents: of one row, without padding.
        imbalance: the most work of a rank, of the mean.
        stride: depths at which one number is taken, the least of them.
    Returns:
        of all tokens; the mean over ranks.
    """
    lengths, seq_len = np.array(documents.lengths[0]), documents.seq_len
    shard_len = seq_len // num_shards
    most = imbalance * float((lengths * (lengths + 1) // 2).sum()) / num_shards
    # How many tokens are no deeper than each depth, and their work.
    reach = np.bincount(lengths)[::-1].cumsum()[::-1][1:]
    tokens = np.append(0, reach.cumsum())
    work = np.append(0, (reach * np.arange(1, len(reach) + 1)).cumsum())
    read = 0
    for length in lengths.tolist():
        first = np.arange(0, length, stride)
        size = np.minimum(stride, length - first)
        depth = first + size - 1
        beyond = length - depth
        work_beyond = (length * (length + 1) - depth * (depth + 1)) / 2
        ranks = np.ceil(np.maximum(beyond / shard_len, work_beyond / most - 1e-9))
        while True:
            cheapest = np.interp(ranks * shard_len - beyond, tokens, work)
            few = ranks * most * (1 + 1e-9) < work_beyond + cheapest
            if not few.any():
                break
            ranks = ranks + few
        read += int((ranks * size).sum())
    return (read - seq_len) / num_shards / seq_len
