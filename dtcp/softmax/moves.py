"""What attention moves between ranks, by strategy: formulas over the counts of its metadata."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor
from torch import distributed as dist

from dtcp.distributed.groups import group_of
from dtcp.distributed.moves import Moved, Moves
from dtcp.softmax.latent import LatentWidths
from dtcp.softmax.replicated_head_exchange import ReplicatedHeadExchange
from dtcp.style import MixerShape


@dataclass(frozen=True)
class AttentionShape(MixerShape):
    """Sizes of an attention call: what its traffic depends on, beside layout and mask.

    Args:
        values_only: a key is made from its value where it arrives, and does not travel.
        latent: channels of the latent and the rotary key that travel where keys and values of all
            heads are made of them; 0 where these travel themselves.
        wide: gradients of keys travel in the dtype in which they are summed.
        beside_query: channels that go with a query where it travels.
    """

    batch: int
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    element_size: int
    values_only: bool = False
    latent: int = 0
    wide: bool = False
    beside_query: int = 0

    @property
    def query_row(self) -> int:
        """Bytes that travel for one token's queries."""
        width = self.key_dim + self.beside_query
        return self.batch * self.heads * width * self.element_size

    @property
    def key_row(self) -> int:
        """Bytes that travel for one token's K and V."""
        if self.latent:
            return self.batch * self.latent * self.element_size
        width = self.value_dim + (0 if self.values_only else self.key_dim)
        return self.batch * self.kv_heads * width * self.element_size

    @property
    def grad_row(self) -> int:
        """Bytes that travel home for the gradients of one token's K and V."""
        size = self.accumulated if self.wide else self.element_size
        return self.key_row // self.element_size * size

    @property
    def made_row(self) -> int:
        """Bytes of the keys and values that are made of one token's latent."""
        made = self.heads * (self.key_dim + self.value_dim) if self.latent else 0
        return self.batch * made * self.element_size

    @property
    def accumulated(self) -> int:
        """Bytes of an element of a sum: fp32, or fp64 for fp64."""
        return max(4, self.element_size)

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor | None,
        v: Tensor,
        up: Tensor | None = None,
        *,
        beside: Sequence[Tensor] = (),
    ) -> "AttentionShape":
        """That of q [B, L, H, D], k [B, L, G, D] and v [B, L, G, V]; no k where values suffice.

        With `up`, v is the rows of a latent, [B, L, 1, C + R].
        """
        batch, _, heads, key_dim = q.shape
        kv_heads, value_dim = v.shape[2:]
        size = q.element_size()
        if up is not None:
            value_dim = LatentWidths.of(q, v, up).value
            return cls(batch, heads, heads, key_dim, value_dim, size, latent=v.shape[3])
        sizes = (batch, heads, kv_heads, key_dim, value_dim, size)
        channels = sum(each.shape[-1] for each in beside)
        return cls(*sizes, values_only=k is None, beside_query=channels)


@dataclass(frozen=True)
class Peers:
    """The ranks of an axis, as one of them sees them.

    Args:
        group_size: of the neighbours that trade heads; all ranks unless said.
    """

    num_ranks: int
    rank: int
    group_size: int

    @classmethod
    def of(cls, groups: Sequence[str]) -> "Peers":
        """Those of an op's process groups: (axis,), or (axis, within, between)."""
        axis = group_of(groups[0])
        within = group_of(groups[1]) if len(groups) > 1 else axis
        return cls(dist.get_world_size(axis), dist.get_rank(axis), dist.get_world_size(within))

    def between(self) -> "Peers":
        """The groups, as this one sees them."""
        groups = self.num_ranks // self.group_size
        return Peers(groups, self.rank // self.group_size, groups)

    def placed_within(self, moved: Moved) -> Moved:
        """What is moved within this rank's group, by rank of the axis."""
        first = self.rank // self.group_size * self.group_size
        after = (0,) * (self.num_ranks - first - self.group_size)
        sent, received = ((0,) * first + x + after for x in (moved.sent, moved.received))
        return replace(moved, sent=sent, received=received)

    def placed_between(self, moved: Moved) -> Moved:
        """What is moved between this rank's like in every group, by rank of the axis."""
        sent, received = [0] * self.num_ranks, [0] * self.num_ranks
        like = range(self.rank % self.group_size, self.num_ranks, self.group_size)
        # Of groups that move nothing there is nothing to place.
        for peer, out, back in zip(like, moved.sent, moved.received, strict=False):
            sent[peer], received[peer] = out, back
        return replace(moved, sent=tuple(sent), received=tuple(received))


def keys_moved(
    shape: AttentionShape,
    sent: Sequence[int],
    received: Sequence[int],
    length: int,
    rank: int,
    *,
    kept: bool = False,
) -> Moves:
    """Keys brought in one exchange, forward and backward, and their gradients home.

    Args:
        sent, received: tokens, by rank.
        length: local keys.
        kept: whether backward has what arrived, and brings none again.
    """
    row, away, here = shape.key_row, sum(sent), sum(received)
    held, made = length + here, shape.made_row
    wide = (row + made) // shape.element_size * shape.accumulated
    # Packed and received rows, with what they are put in order from and into; then, backward,
    # the ordered keys and their gradients in that order and by source.
    forward = Moved.rows(
        sent, received, row, rank, workspace=row * (away + here) + (2 * row + made) * held
    )
    back = shape.grad_row
    home = Moved.rows(
        received, sent, back, rank, workspace=(row + made + 2 * wide) * held + back * away
    )
    if kept:
        ordered = (2 * row + made) * held
        return Moves(forward, replace(home, workspace=max(home.workspace, ordered)))
    return Moves(forward, forward + home)


def steps_moved(
    shape: AttentionShape,
    sent: Sequence[int],
    received: Sequence[int],
    length: int,
    rank: int,
    *,
    queries: int,
    step: int | None = None,
) -> Moves:
    """Keys brought step by step, those of two steps held at most.

    Args as of `keys_moved`, `queries`, the local ones, and `step`, the most keys of one; None for
    those of a rank.
    """
    moves = keys_moved(shape, sent, received, length, rank)
    row, step = shape.key_row, max((*sent, *received), default=0) if step is None else step
    wide = (row + shape.made_row) // shape.element_size * shape.accumulated
    partial = shape.batch * queries * shape.heads * shape.value_dim * shape.accumulated
    held = 4 * row * step + shape.made_row * max(length, step)
    return Moves(
        replace(moves.forward, workspace=held + partial),
        replace(moves.backward, workspace=held + wide * (length + 2 * step)),
    )


def heads_moved(
    shape: AttentionShape,
    length: int,
    num_ranks: int,
    rank: int,
    *,
    keys: int = 0,
    per_node: int = 0,
) -> Moves:
    """q, k, v go out by heads and out comes back; backward moves their gradients alike.

    Args:
        keys: local ones, where they are of another sequence; 0 where they are the queries' own.
        per_node: of the ranks, neighbours that share a node; 0: nobody has said.
    """
    replicas = max(num_ranks // shape.kv_heads, 1)
    replicated = ReplicatedHeadExchange.of(num_ranks, rank, per_node, replicas)
    kv_heads, keys = max(shape.kv_heads, num_ranks), keys or length
    of_keys = keys * kv_heads * (shape.value_dim + (0 if shape.values_only else shape.key_dim))
    # Gradients of a kv head that is replicated are summed at home.
    factor = shape.grad_row // shape.key_row if replicas > 1 else 1
    # What is sent and what has arrived, of the wider of the two trades.
    queries = length * shape.query_row
    held = 2 * (queries + shape.batch * of_keys * shape.element_size)
    outputs = shape.batch * length * shape.heads * shape.value_dim * shape.element_size
    each = (queries + outputs) // num_ranks
    of_heads = Moved.alike(each, num_ranks, rank, workspace=held)
    if replicated is None:
        whole = shape.batch * of_keys * shape.element_size
        ways = ((whole * x // num_ranks, 2 * whole * x) for x in (1, factor))
        moves = (Moved.alike(each, num_ranks, rank, workspace=held) for each, held in ways)
        return Moves(*(of_heads + moved for moved in moves))
    there = replicated.moved(keys, shape.key_row // shape.kv_heads)
    wide = there.workspace * shape.accumulated // shape.element_size
    home = replicated.moved(keys, shape.key_row // shape.kv_heads * factor)
    home = Moved(home.received, home.sent, wide)
    return Moves(of_heads + there, of_heads + home)


def counts_by_step(counts: Tensor, rank: int) -> tuple[list[int], list[int]]:
    """[2, n] tokens sent s places on and received from s places back, by rank."""
    sent, received = counts.tolist()
    ranks = range(len(sent))
    return [sent[peer - rank] for peer in ranks], [received[rank - peer] for peer in ranks]
