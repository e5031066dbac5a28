"""The mask function of our tables, in FlashAttention 4's language."""

from collections.abc import Callable
from functools import cache
from typing import Any


@cache
def interval_mask_function() -> Callable[..., Any]:
    """Make the function; imports cutlass. One object, since what is compiled is found by it."""
    import cutlass
    from cutlass import cute
    from flash_attn.cute.utils import scalar_to_ssa

    @cute.jit
    def interval_mask(
        batch: Any, head: Any, query: Any, key: Any, seqlen_info: Any, aux_tensors: Any
    ) -> Any:
        """Whether a query sees a key: aux_tensors are first_key, last_key [B, L], token_index [K].

        A slot without a key has token index -1, which lies in no interval.
        """
        first_key, last_key, token_index = aux_tensors
        row, index = batch[0], token_index[key[0]]
        seen = (first_key[row, query[0]] <= index) & (index <= last_key[row, query[0]])
        return scalar_to_ssa(seen, cutlass.Boolean)

    return interval_mask
