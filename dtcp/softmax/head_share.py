"""Which heads each of the ranks attends with that trade heads for sequence."""

from dataclasses import dataclass

from torch import Tensor

from dtcp.kernels.dtypes import accumulation


@dataclass(frozen=True)
class HeadShare:
    """Which heads each of n ranks attends with: equal parts, kv heads replicated where G < n."""

    heads: int
    kv_heads: int
    num_ranks: int

    def __post_init__(self) -> None:
        n, kv = self.num_ranks, self.kv_heads
        if self.heads % n or (kv % n and n % kv):
            raise ValueError(
                f"Ulysses deals out whole heads, so ranks divide heads, and kv heads divide ranks "
                f"or the other way round, got heads={self.heads}, kv_heads={kv}, ranks={n}: use "
                f"fewer ranks for it (HybridAttention), or RingAttention."
            )

    @property
    def replicas(self) -> int:
        """Ranks that share one kv head."""
        return max(self.num_ranks // self.kv_heads, 1)

    @property
    def kv_heads_each(self) -> int:
        """Kv heads a rank attends with."""
        return max(self.kv_heads // self.num_ranks, 1)

    def split(self, x: Tensor) -> Tensor:
        """Query heads by rank: [B, L, H, D] -> [n, B, L, H / n, D]."""
        return x.unflatten(2, (self.num_ranks, -1)).movedim(2, 0)

    def split_kv(self, x: Tensor) -> Tensor:
        """Kv heads by rank: [B, L, G, D] -> [n, B, L, max(G, n) / n, D]."""
        return self.split(x.repeat_interleave(self.replicas, dim=2))

    def join(self, x: Tensor) -> Tensor:
        """Inverse of split."""
        return x.movedim(0, 2).flatten(2, 3)

    def join_kv_gradient(self, x: Tensor) -> Tensor:
        """Gradient of split_kv: what the ranks sharing a kv head found is summed, in fp32."""
        by_rank = self.join(x.to(accumulation(x.dtype)))
        return by_rank.unflatten(2, (self.kv_heads, self.replicas)).sum(3)
