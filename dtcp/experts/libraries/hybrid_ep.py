"""HybridEP: tokens travel by NVLink inside a node and by RDMA between nodes, sorted as they arrive.

Written to `deep_ep.HybridEPBuffer` of DeepEP's branch hybrid-ep,
https://github.com/deepseek-ai/DeepEP/tree/hybrid-ep, whose kernels sort rows by expert and sum
them. Ranks have equally many tokens, as ranks of cp do.
"""

import importlib
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dtcp.distributed.groups import group_of
from dtcp.experts.libraries.types import Handle

TOKENS, CONFIG = 8, 9
"""Places of what is no tensor in a handle of HybridEP: 11 parts, as dispatch_with_permute has
them."""


class HybridEP:
    """HybridEP on a process group; its buffer grows with the batches."""

    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,)
    needs = "HybridEPBuffer"
    source = "DeepEP's branch hybrid-ep (https://github.com/deepseek-ai/DeepEP/tree/hybrid-ep)"

    def __init__(self, group: str) -> None:
        self.group, self.buffer = group, None
        # Tokens, hidden channels and experts that the buffer is made for.
        self.room: tuple[int, ...] = (0, 0, 0)

    def dispatch(
        self, x: Tensor, index: Tensor, weight: Tensor, num_experts: int
    ) -> tuple[Tensor, Tensor, Tensor, Handle]:
        """As of TokenLibrary. The host waits for the number of rows."""
        each = num_experts // group_of(self.group).size()
        chosen = x.new_zeros(len(x), num_experts + 1, dtype=torch.bool).scatter(1, index, True)
        # Added up, where a token has chosen an expert twice.
        of_expert = weight.new_zeros(len(x), num_experts + 1).scatter_add(1, index, weight)
        rows, weights, _, per_expert, handle = self._buffer_for(x, each).dispatch_with_permute(
            hidden=x.contiguous(),
            routing_map=chosen[:, :-1].contiguous(),
            probs=of_expert[:, :-1].contiguous(),
            num_of_experts_per_rank=each,
        )
        ends = per_expert.to(x.device).cumsum(0).to(torch.int32)
        tensors = [part for place, part in enumerate(handle) if place not in (TOKENS, CONFIG)]
        numbers = [handle[TOKENS], len(rows), x.shape[1], each]
        return rows, weights, ends, Handle(tensors, numbers)

    def dispatch_again(self, x: Tensor, handle: Handle) -> Tensor:
        num_rows = handle.numbers[1]
        own = self._own(handle)
        rows, *_ = self._made().dispatch_with_permute(
            hidden=x.contiguous(), handle=own, num_permuted_tokens=num_rows
        )
        return rows

    def combine(self, rows: Tensor, handle: Handle) -> Tensor:
        own = self._own(handle)
        x, _ = self._made().combine_with_unpermute(hidden=rows.contiguous(), handle=own)
        return x

    def combine_weights(
        self, rows: Tensor, weights: Tensor, index: Tensor, handle: Handle
    ) -> tuple[Tensor, Tensor]:
        own = self._own(handle)
        x, of_expert = self._made().combine_with_unpermute(
            hidden=rows.contiguous(), probs=weights.contiguous(), handle=own
        )
        return x, F.pad(of_expert, (0, 1)).gather(1, index)

    def _buffer_for(self, x: Tensor, num_local_experts: int) -> Any:
        """The buffer, made anew where the batch is larger: all ranks have batches of one size."""
        needed = (len(x), x.shape[1], num_local_experts)
        room = tuple(map(max, needed, self.room))
        group, buffer = group_of(self.group), self._made()
        if buffer is None or buffer.group is not group or room != self.room:
            library: Any = importlib.import_module("deep_ep")
            tokens, hidden, experts = self.room = room
            self.buffer = library.HybridEPBuffer(
                group,
                hidden_dim=hidden,
                max_num_of_tokens_per_rank=tokens,
                num_local_experts=experts,
            )
        return self.buffer

    def _made(self) -> Any:
        return self.buffer

    def _own(self, handle: Handle) -> tuple[Any, ...]:
        """HybridEP's own handle: its config is what it gives for these sizes every time."""
        tokens, _, hidden, each = handle.numbers
        config = self._made().update_template_config(
            hidden_dim=hidden, num_of_tokens_per_rank=tokens, num_local_experts=each
        )
        return (*handle.tensors[:TOKENS], tokens, config, *handle.tensors[TOKENS:])
