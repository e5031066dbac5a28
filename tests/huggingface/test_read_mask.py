"""Masks read off the functions that models of transformers make them by."""

import pytest
import torch

from dtcp.huggingface.read_mask import read_block_mask, read_mask
from dtcp.sequence.masks import (
    AttentionChunks,
    Bidirectional,
    BlockBidirectional,
    Causal,
    SlidingWindow,
)

READ = {
    "causal": (lambda q, k: k <= q, Causal()),
    "everything": (lambda q, k: k >= 0, Bidirectional()),
    "window": (lambda q, k: (k <= q) & (k > q - 5), Causal() & SlidingWindow(5)),
    "the token itself": (lambda q, k: k == q, Causal() & SlidingWindow(1)),
    "two sides": (lambda q, k: (k <= q + 2) & (k > q - 5), SlidingWindow(5, right=2)),
    "chunks": (lambda q, k: (k <= q) & (k // 7 == q // 7), Causal() & AttentionChunks(7)),
}
UNKNOWN = {
    "without the token itself": lambda q, k: k < q,
    "a window without it": lambda q, k: (k < q) & (k > q - 5),
    "what comes after": lambda q, k: (k > q) & (k < q + 5),
    "some keys of a window": lambda q, k: (k <= q) & (k > q - 9) & ((q - k) % 2 == 0),
    "a window from the tenth token on": lambda q, k: (k <= q) & ((q < 10) | (k > q - 5)),
    "chunks both ways": lambda q, k: k // 7 == q // 7,
    "nothing": lambda q, k: k < 0,
}


@pytest.mark.parametrize("name", READ)
def test_the_mask_read_off_a_function_is_that_of_its_rule(name):
    rule, mask = READ[name]
    assert read_mask(lambda batch, head, q, k: rule(q, k)) == mask


@pytest.mark.parametrize("name", UNKNOWN)
def test_no_mask_is_read_off_a_function_of_another_rule(name):
    assert read_mask(lambda batch, head, q, k: UNKNOWN[name](q, k)) is None


def test_blocks_are_looked_up_by_row_and_token_at_once():
    """Only then is the look-up answered for tokens that the row does not have."""
    block = torch.tensor([[-1, -1, 0, 0, -1, 1, 1, -1]])

    def at_once(batch, head, q, k):
        return (k <= q) | ((block[batch, q] == block[batch, k]) & (block[batch, q] >= 0))

    def in_two_steps(batch, head, q, k):
        return (k <= q) | ((block[batch][q] == block[batch][k]) & (block[batch][q] >= 0))

    assert read_block_mask(at_once, block) == (Causal() | BlockBidirectional(), True)
    assert read_block_mask(in_two_steps, block) == (None, False)
    assert read_block_mask(lambda batch, head, q, k: k <= q, block) == (Causal(), False)
