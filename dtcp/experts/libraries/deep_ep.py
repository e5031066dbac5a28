"""DeepEP 2: a token travels to each rank of its experts once, and is summed there and at home.

Written to `deep_ep.ElasticBuffer` of DeepEP 2.1, https://github.com/deepseek-ai/DeepEP, in its
compact layout, whose kernels serve backward passes too. It finds out itself which ranks share a
node, and crosses between nodes once per node. Which sums it takes first follows from that.
"""

import importlib
from typing import Any

import torch
from torch import Tensor

from dtcp.distributed.collectives import sum_dtype
from dtcp.distributed.groups import group_of
from dtcp.experts.libraries.types import Handle
from dtcp.sequence.host import on_device

TENSORS = (
    "topk_idx",
    "psum_num_recv_tokens_per_scaleup_rank",
    "psum_num_recv_tokens_per_expert",
    "num_unaligned_recv_tokens_per_expert",
    "recv_src_metadata",
    "dst_buffer_slot_idx",
    "token_metadata_at_forward",
    "channel_linked_list",
)
NUMBERS = (
    "num_experts",
    "expert_alignment",
    "num_max_tokens_per_rank",
    "num_sms",
    "num_recv_tokens",
    "num_expanded_tokens",
)
"""What deep_ep.EPHandle is made of, beside the list of rows per expert."""
SORT_KEYS = "cached_recv_src_metadata_before_sort"
"""What an EPHandle remembers besides, where rows come in a fixed order."""


class DeepEP:
    """DeepEP on a process group; its buffer grows with the batches."""

    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,)
    needs, source = "ElasticBuffer", "DeepEP 2 (https://github.com/deepseek-ai/DeepEP)"

    def __init__(self, group: str) -> None:
        self.group, self.buffer = group, None
        # Tokens, hidden channels and choices that the buffer is made for.
        self.room: tuple[int, ...] = (0, 0, 0)

    def dispatch(
        self, x: Tensor, index: Tensor, weight: Tensor, num_experts: int
    ) -> tuple[Tensor, Tensor, Tensor, Handle]:
        """As of TokenLibrary. The host waits for the number of rows."""
        library: Any = importlib.import_module("deep_ep")
        per_token = index.shape[1]
        chosen = index.masked_fill(index == num_experts, -1).to(library.topk_idx_t)
        rows, experts, weights, handle, _ = self._buffer_for(x, per_token).dispatch(
            x.contiguous(),
            topk_idx=chosen.contiguous(),
            topk_weights=weight.contiguous(),
            num_experts=num_experts,
            num_max_tokens_per_rank=len(x),
            do_expand=False,
            do_cpu_sync=True,
        )
        per_expert = torch.tensor(handle.num_recv_tokens_per_expert_list)
        # Each place of an arrived token's choices, by expert; those of other ranks' experts last.
        flat = experts.flatten()
        by_expert = torch.where(flat < 0, num_experts, flat).argsort(stable=True)
        choice = by_expert[: int(per_expert.sum())]
        ends = on_device(per_expert.cumsum(0).to(torch.int32), x.device)
        taken = Handle(
            [choice, getattr(handle, SORT_KEYS), *(getattr(handle, name) for name in TENSORS)],
            [per_token, *(getattr(handle, name) for name in NUMBERS), *per_expert.tolist()],
        )
        return rows[choice // per_token], weights.flatten()[choice], ends, taken

    def dispatch_again(self, x: Tensor, handle: Handle) -> Tensor:
        own = _ep_handle(handle)
        # It would look for the number of experts, which it reads off the handle later.
        rows, *_ = self._buffer_for(x, handle.numbers[0]).dispatch(
            x.contiguous(), handle=own, num_sms=own.num_sms, do_cpu_sync=False
        )
        return rows[_choice(handle) // handle.numbers[0]]

    def combine(self, rows: Tensor, handle: Handle) -> Tensor:
        own = _ep_handle(handle)
        x, *_ = self._made().combine(_token_sums(rows, handle, own), handle=own)
        return x

    def combine_weights(
        self, rows: Tensor, weights: Tensor, index: Tensor, handle: Handle
    ) -> tuple[Tensor, Tensor]:
        own, choice = _ep_handle(handle), _choice(handle)
        places = weights.new_zeros(own.num_recv_tokens * handle.numbers[0])
        places = places.index_copy_(0, choice, weights).view(-1, handle.numbers[0])
        x, weight, _ = self._made().combine(
            _token_sums(rows, handle, own), handle=own, topk_weights=places
        )
        return x, weight

    def _buffer_for(self, x: Tensor, per_token: int) -> Any:
        """The buffer, made anew where the batch is larger: all ranks have batches of one size."""
        needed = (len(x), x.shape[1], per_token)
        room = tuple(map(max, needed, self.room))
        group, fixed = group_of(self.group), torch.are_deterministic_algorithms_enabled()
        buffer: Any = self.buffer
        if (
            buffer is None
            or buffer.group is not group
            or buffer.deterministic != fixed
            or room != self.room
        ):
            library: Any = importlib.import_module("deep_ep")
            tokens, hidden, choices = self.room = room
            self.buffer = library.ElasticBuffer(
                group,
                num_max_tokens_per_rank=tokens,
                hidden=hidden,
                num_topk=choices,
                deterministic=fixed,
            )
        return self.buffer

    def _made(self) -> Any:
        """The buffer of a dispatch that has been."""
        return self.buffer


def _choice(handle: Handle) -> Tensor:
    choice = handle.tensors[0]
    assert choice is not None
    return choice


def _ep_handle(handle: Handle) -> Any:
    """deep_ep's own handle, of which `dispatch` has taken the parts."""
    library: Any = importlib.import_module("deep_ep")
    _, sort_keys, *tensors = handle.tensors
    first, last = 1, 1 + len(NUMBERS)
    made = library.EPHandle(
        do_expand=False,
        **dict(zip(NUMBERS, handle.numbers[first:last], strict=True)),
        num_recv_tokens_per_expert_list=handle.numbers[last:],
        **dict(zip(TENSORS, tensors, strict=True)),
    )
    setattr(made, SORT_KEYS, sort_keys)
    return made


def _token_sums(rows: Tensor, handle: Handle, own: Any) -> Tensor:
    """The rows of each arrived token summed: what goes home is one row of each."""
    wide = rows.new_zeros(own.num_recv_tokens, rows.shape[1], dtype=sum_dtype(rows))
    token = _choice(handle) // handle.numbers[0]
    return wide.index_add_(0, token, rows.to(wide.dtype)).to(rows.dtype)
