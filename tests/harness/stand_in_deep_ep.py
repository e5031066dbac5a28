"""Stand-ins for deep_ep: DeepEP's ElasticBuffer and HybridEP's HybridEPBuffer, on gloo ranks.

Their signatures, layouts and refusals, in any dtype of floats. What the kernels' own metadata hold
is known to them alone; here it is checked that all of it comes back as it was given out.

Written from deepseek-ai/DeepEP: deep_ep/buffers/elastic.py of main (2.1.0, dd758ca) and
deep_ep/hybrid_ep_buffer.py of the branch hybrid-ep (94a9f8f).
"""

from types import ModuleType

import torch
from torch import distributed as dist

GARBAGE = 1e30
"""In what nobody is to read."""


def gathered(x, group):
    """Everyone's tensor, of whatever size, by rank."""
    everyones = [None] * group.size()
    dist.all_gather_object(everyones, x, group=group)
    return everyones


# --- main: deep_ep.ElasticBuffer ---

topk_idx_t = torch.int64


class EPHandle:
    def __init__(
        self,
        do_expand,
        num_experts,
        expert_alignment,
        num_max_tokens_per_rank,
        num_sms,
        topk_idx,
        num_recv_tokens,
        num_expanded_tokens,
        num_recv_tokens_per_expert_list,
        psum_num_recv_tokens_per_scaleup_rank,
        psum_num_recv_tokens_per_expert,
        num_unaligned_recv_tokens_per_expert,
        recv_src_metadata,
        dst_buffer_slot_idx,
        token_metadata_at_forward,
        channel_linked_list,
    ):
        assert topk_idx is not None
        given = {name: x for name, x in locals().items() if name not in ("self", "given")}
        vars(self).update(given)
        self.cached_recv_src_metadata_before_sort = None


class EventOverlap:
    event = None


class ElasticBuffer:
    """Arrived tokens come from the last rank first, unless the order is to be fixed."""

    def __init__(
        self,
        group,
        num_bytes=None,
        num_cpu_bytes=0,
        num_max_tokens_per_rank=0,
        hidden=0,
        num_topk=0,
        use_fp8_dispatch=False,
        deterministic=False,
        allow_hybrid_mode=True,
        allow_multiple_reduction=True,
        prefer_overlap_with_compute=True,
        sl_idx=3,
        num_allocated_qps=0,
        num_cpu_timeout_secs=300,
        num_gpu_timeout_secs=100,
        explicitly_destroy=False,
    ):
        assert num_bytes is None and not use_fp8_dispatch and not num_cpu_bytes
        self.group, self.deterministic = group, deterministic
        self.num_max_tokens_per_rank, self.hidden, self.num_topk = (
            num_max_tokens_per_rank,
            hidden,
            num_topk,
        )
        dist.barrier(group)

    def get_theoretical_num_sms(self, num_experts, num_topk):
        return 20 + num_experts // num_experts

    def dispatch(
        self,
        x,
        topk_idx=None,
        topk_weights=None,
        cumulative_local_expert_recv_stats=None,
        num_experts=None,
        num_max_tokens_per_rank=None,
        expert_alignment=None,
        num_sms=0,
        num_qps=0,
        previous_event=None,
        previous_event_before_epilogue=None,
        async_with_compute_stream=False,
        allocate_on_comm_stream=False,
        handle=None,
        do_handle_copy=True,
        do_cpu_sync=None,
        do_expand=False,
        do_zero_padding=False,
        use_tma_aligned_col_major_sf=False,
    ):
        assert x.is_contiguous() and not do_expand and not async_with_compute_stream
        num_topk = (handle.topk_idx if topk_idx is None else topk_idx).shape[1]
        num_sms = self.get_theoretical_num_sms(num_experts, num_topk) if num_sms == 0 else num_sms
        if handle is not None:
            assert topk_idx is None and topk_weights is None and not do_cpu_sync
            self._check(handle)
            rows = torch.cat(gathered(x, self.group))
            source = handle.recv_src_metadata[:, 0].long()
            return rows[source], None, None, handle, EventOverlap()
        assert do_cpu_sync and topk_idx.dtype == topk_idx_t and topk_weights.is_contiguous()
        assert len(x) <= self.num_max_tokens_per_rank and x.shape[1] <= self.hidden
        assert num_topk <= self.num_topk and len(x) == num_max_tokens_per_rank
        assert topk_weights.dtype in (torch.float32, torch.float64)
        each = num_experts // self.group.size()
        rows, index, weights = (
            torch.cat(gathered(y, self.group)) for y in (x, topk_idx, topk_weights)
        )
        local = index - self.group.rank() * each
        local = torch.where((local < 0) | (local >= each), -1, local)
        source = (local >= 0).any(1).nonzero()[:, 0]
        source = source if self.deterministic else source.flip(0)
        per_expert = torch.bincount(local[source].flatten() + 1, minlength=each + 1)[1:]
        metadata = torch.zeros(len(source), num_topk + 2, dtype=torch.int32)
        metadata[:, 0] = source
        of_rank = torch.bincount(source // len(x), minlength=self.group.size())
        made = EPHandle(
            do_expand,
            num_experts,
            1 if expert_alignment is None else expert_alignment,
            num_max_tokens_per_rank,
            num_sms,
            topk_idx.clone(),
            len(source),
            int(per_expert.sum()),
            per_expert.tolist(),
            of_rank.cumsum(0).to(torch.int32),
            torch.cat([per_expert.new_zeros(1), per_expert]).cumsum(0).to(torch.int32)[1:],
            torch.empty(0, dtype=torch.int32) if self.deterministic else None,
            metadata,
            torch.arange(len(x) * num_topk, dtype=torch.int32).view(len(x), num_topk),
            None,
            None,
        )
        if self.deterministic:
            made.cached_recv_src_metadata_before_sort = metadata.flip(0)
        # The weights of other ranks' experts arrive, too.
        return rows[source], local[source], weights[source], made, EventOverlap()

    def combine(
        self,
        x,
        handle,
        topk_weights=None,
        bias=None,
        num_sms=0,
        num_qps=0,
        previous_event=None,
        previous_event_before_epilogue=None,
        async_with_compute_stream=False,
        allocate_on_comm_stream=False,
    ):
        assert bias is None and not async_with_compute_stream
        self._check(handle)
        assert x.is_contiguous() and len(x) == handle.num_recv_tokens
        assert topk_weights is None or topk_weights.is_contiguous()
        tokens, first = len(handle.topk_idx), self.group.rank() * handle.num_max_tokens_per_rank
        out = x.new_zeros(tokens, x.shape[1])
        weights = None if topk_weights is None else topk_weights.new_zeros(handle.topk_idx.shape)
        sent = (handle.recv_src_metadata[:, 0].long(), x, topk_weights)
        for source, rows, given in gathered(sent, self.group):
            mine = (source >= first) & (source < first + tokens)
            out.index_add_(0, source[mine] - first, rows[mine])
            if weights is not None:
                weights.index_add_(0, source[mine] - first, given[mine])
        if weights is not None:
            weights.masked_fill_(handle.topk_idx < 0, GARBAGE)
        return out, weights, EventOverlap()

    def _check(self, handle):
        """What was given out has come back."""
        tokens, num_topk = handle.topk_idx.shape
        slots = torch.arange(tokens * num_topk, dtype=torch.int32).view(tokens, num_topk)
        assert torch.equal(handle.dst_buffer_slot_idx, slots) and handle.num_sms == 21
        assert handle.recv_src_metadata.shape == (handle.num_recv_tokens, num_topk + 2)
        assert handle.psum_num_recv_tokens_per_scaleup_rank[-1] == handle.num_recv_tokens
        assert handle.psum_num_recv_tokens_per_expert[-1] == handle.num_expanded_tokens
        assert sum(handle.num_recv_tokens_per_expert_list) == handle.num_expanded_tokens
        assert handle.token_metadata_at_forward is None and handle.channel_linked_list is None
        unsorted = handle.cached_recv_src_metadata_before_sort
        assert (unsorted is not None) == self.deterministic
        assert unsorted is None or torch.equal(unsorted, handle.recv_src_metadata.flip(0))
        assert (handle.num_unaligned_recv_tokens_per_expert is not None) == self.deterministic


# --- branch hybrid-ep: deep_ep.HybridEPBuffer ---


class HybridEPBuffer:
    """Arrived rows are sorted by expert, rank and token, as its kernels sort them."""

    def __init__(
        self,
        group,
        hidden_dim,
        max_num_of_tokens_per_rank,
        num_local_experts,
        use_fp8=False,
        num_sms_dispatch_api=None,
        num_sms_combine_api=None,
        num_sms_preprocessing_api=None,
        num_blocks_permute=None,
        num_blocks_unpermute=None,
        load_cached_kernels=False,
        use_shared_buffer=True,
        enable_custom_allgather=False,
        num_of_hybrid_ep_ranks_per_nvlink_domain=None,
        use_mnnvl=None,
    ):
        assert not use_fp8
        self.group, self.num_local_experts = group, num_local_experts
        self.hidden_dim, self.tokens = hidden_dim, max_num_of_tokens_per_rank
        dist.barrier(group)

    def update_template_config(
        self,
        hidden_dim=None,
        num_of_tokens_per_rank=None,
        num_local_experts=None,
        pad_multiple=None,
        use_fp8=None,
        fuse_permute_dispatch=False,
        **kwargs,
    ):
        return ("config", hidden_dim, -(-num_of_tokens_per_rank // 16) * 16, num_local_experts)

    def dispatch_with_permute(
        self,
        *,
        hidden,
        topk_idx=None,
        topk_weights=None,
        num_of_experts_per_rank=None,
        num_of_experts=None,
        use_fp8=None,
        routing_map=None,
        probs=None,
        scaling_factor=None,
        num_permuted_tokens=None,
        pad_multiple=None,
        handle=None,
        non_blocking=False,
        fuse_permute_dispatch=False,
        num_dispatched_tokens=None,
        use_host_meta=None,
    ):
        assert hidden.is_contiguous() and not non_blocking and not fuse_permute_dispatch
        assert pad_multiple is None and topk_idx is None
        given, per_expert = hidden, None
        hidden = torch.cat(gathered(hidden, self.group))
        if handle is None:
            assert routing_map.dtype == torch.bool and routing_map.is_contiguous()
            assert probs.is_contiguous() and len(routing_map) == len(given)
            assert given.shape[1] <= self.hidden_dim and len(given) <= self.tokens
            every = torch.cat(gathered(routing_map, self.group))
            first = self.group.rank() * num_of_experts_per_rank
            local = every[:, first : first + num_of_experts_per_rank]
            per_expert = local.sum(0)
            order = local.T.nonzero()  # [R, 2]: expert, token
            rows_of = torch.full(local.shape, -1, dtype=torch.int32)
            rows_of[order[:, 1], order[:, 0]] = torch.arange(len(order), dtype=torch.int32)
            handle = (
                order.to(torch.int32),
                every.any(1),
                torch.empty(len(given), 0, dtype=torch.bool),
                torch.tensor([int(local.any(1).sum())], dtype=torch.int32),
                local.contiguous(),
                torch.tensor([7, 8, 9] * 20, dtype=torch.int32),
                rows_of,
                per_expert.to(torch.int32),
                len(given),
                self.update_template_config(
                    given.shape[1], len(given), num_of_experts_per_rank, pad_multiple
                ),
                torch.zeros(1, dtype=torch.int32),
            )
        else:
            assert routing_map is None and probs is None
            assert num_permuted_tokens == len(handle[0])
        self._check(handle, given.shape[1])
        expert, token = handle[0].long().T
        weights = None
        if probs is not None:
            first = self.group.rank() * num_of_experts_per_rank
            weights = torch.cat(gathered(probs, self.group))[token, expert + first]
        return hidden[token], weights, None, per_expert, handle

    def combine_with_unpermute(
        self,
        *,
        hidden,
        probs=None,
        handle=None,
        pad_multiple=None,
        fuse_unpermute_combine=False,
        num_dispatched_tokens=None,
    ):
        assert hidden.is_contiguous() and handle is not None and not fuse_unpermute_combine
        self._check(handle, hidden.shape[1])
        tokens, each = handle[8], handle[4].shape[1]
        mine = self.group.rank() * tokens
        out = hidden.new_zeros(tokens, hidden.shape[1])
        dense = None if probs is None else probs.new_zeros(tokens, each * self.group.size())
        for rank, (order, rows, given) in enumerate(
            gathered((handle[0].long(), hidden, probs), self.group)
        ):
            here = (order[:, 1] >= mine) & (order[:, 1] < mine + tokens)
            token = order[here, 1] - mine
            out.index_add_(0, token, rows[here])
            if dense is not None:
                dense[token, order[here, 0] + rank * each] = given[here]
        return out, dense

    def _check(self, handle, hidden_dim):
        assert len(handle) == 11 and handle[8] * self.group.size() == len(handle[1])
        config = self.update_template_config(hidden_dim, handle[8], handle[4].shape[1])
        assert handle[9] == config and handle[2].shape == (handle[8], 0)
        assert handle[3].tolist() == [int(handle[4].any(1).sum())]
        assert handle[5].tolist() == [7, 8, 9] * 20 and handle[10].tolist() == [0]
        assert torch.equal(handle[7].long(), handle[4].sum(0))
        assert torch.equal(handle[6] >= 0, handle[4])


def deep_ep_with(*names):
    """The package deep_ep as one of its branches has it."""
    package = ModuleType("deep_ep")
    package.__spec__ = __spec__
    for name in names:
        setattr(package, name, globals()[name])
    return package


MAIN = ("ElasticBuffer", "EPHandle", "topk_idx_t")
HYBRID = ("HybridEPBuffer",)
