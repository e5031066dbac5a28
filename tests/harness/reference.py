"""The truth that tests compare with: one device, fp64, dense, no cleverness.

Nothing here comes from dtcp. What a token sees is decided pair by pair in Python loops.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    sink: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over all keys that are visible.

    Query head h reads key head h // (H / G). The sink is the logit of one more key, whose value
    is zero; the lse leaves it out. A query that sees nothing has out = 0 and lse = -inf, and
    sends no gradient.

    Args:
        q: [B, S, H, D].
        k, v: [B, S, G, D], with a D of their own for v.
        visible: [B, S, S], bool, query first.
        softcap: scores are softcap * tanh(score / softcap); 0 leaves them.
        sink: [H].
    Returns:
        [B, S, H, D] and lse [B, S, H], fp64.
    """
    q, k, v = q.double(), k.double(), v.double()
    B, S, H, D = q.shape
    group = H // k.shape[2]
    k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)

    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * (D**-0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    # A blind query looks at everything and is zeroed after: a row of -inf has NaN gradients.
    blind = ~visible.any(dim=-1)  # [B, S]
    scores = scores.masked_fill(~(visible | blind[..., None])[:, None], -torch.inf)
    lse = scores.logsumexp(dim=-1)  # [B, H, S]
    if sink is not None:
        column = sink.double().view(1, H, 1, 1).expand(B, H, S, 1)
        scores = torch.cat((scores, column), dim=-1)
    weights = scores.softmax(dim=-1)[..., : k.shape[1]]
    out = torch.einsum("bhqk,bkhd->bqhd", weights, v)
    out = torch.where(blind[:, :, None, None], 0.0, out)
    return out, torch.where(blind[:, :, None], -torch.inf, lse.transpose(1, 2))


class Pair(NamedTuple):
    """A query and a key of one document of one row: all that a rule is asked about."""

    row: int
    document: int
    start: int  # position of the document's first token
    query: int  # position
    key: int  # position


Rule = Callable[[Pair], bool]


def visible(lengths: Sequence[Sequence[int]], seq_len: int, rule: Rule) -> Tensor:
    """Who sees whom, inside documents only: [B, S, S], bool.

    Args:
        lengths: of the documents of every row, in tokens; what is left of a row is padding.
    """
    table = torch.zeros(len(lengths), seq_len, seq_len, dtype=torch.bool)
    for row, documents in enumerate(lengths):
        start = 0
        for document, length in enumerate(documents):
            for query in range(start, start + length):
                for key in range(start, start + length):
                    table[row, query, key] = rule(Pair(row, document, start, query, key))
            start += length
    return table


def causal(pair: Pair) -> bool:
    """What has come so far."""
    return pair.key <= pair.query


def bidirectional(pair: Pair) -> bool:
    """The whole document."""
    return True


@dataclass(frozen=True)
class Window:
    """The token, size - 1 tokens left of it, and `right` tokens right of it, or all of them."""

    size: int
    right: int | None = None

    def __call__(self, pair: Pair) -> bool:
        if self.right is not None and pair.key > pair.query + self.right:
            return False
        return pair.key > pair.query - self.size


@dataclass(frozen=True)
class Chunks:
    """The tokens of the query's own chunk: every document is cut from its start."""

    size: int

    def __call__(self, pair: Pair) -> bool:
        query, key = pair.query - pair.start, pair.key - pair.start
        return query // self.size == key // self.size


@dataclass(frozen=True)
class Prefix:
    """What has come so far, and the first lengths[row][document] tokens of the document."""

    lengths: tuple[tuple[int, ...], ...]

    def __call__(self, pair: Pair) -> bool:
        prefix_end = pair.start + self.lengths[pair.row][pair.document]
        return pair.key <= pair.query or pair.key < prefix_end


@dataclass(frozen=True)
class Beginning:
    """The first `size` tokens of the document; or lengths[row][document] of them."""

    size: int = 0
    lengths: tuple[tuple[int, ...], ...] = ()

    def __call__(self, pair: Pair) -> bool:
        size = self.lengths[pair.row][pair.document] if self.lengths else self.size
        return pair.key < pair.start + size


@dataclass(frozen=True)
class Blocks:
    """The tokens with the same id >= 0 as the query, of ids[row][position]."""

    ids: tuple[tuple[int, ...], ...]

    def __call__(self, pair: Pair) -> bool:
        mine, other = self.ids[pair.row][pair.query], self.ids[pair.row][pair.key]
        return mine >= 0 and mine == other


@dataclass(frozen=True)
class Both:
    """Seen by both rules."""

    left: Rule
    right: Rule

    def __call__(self, pair: Pair) -> bool:
        return self.left(pair) and self.right(pair)


@dataclass(frozen=True)
class Either:
    """Seen by one of the rules."""

    left: Rule
    right: Rule

    def __call__(self, pair: Pair) -> bool:
        return self.left(pair) or self.right(pair)


class DeltaRule(NamedTuple):
    """Inputs of a gated delta rule, whole rows."""

    q: Tensor  # [B, S, G, K]
    k: Tensor  # [B, S, G, K]
    v: Tensor  # [B, S, H, V]
    g: Tensor  # [B, S, H], or [B, S, H, K] of key channels
    beta: Tensor  # [B, S, H]


def gated_delta_rule(x: DeltaRule, lengths: Sequence[Sequence[int]]) -> Tensor:
    """The recurrence token by token, from nothing at each document and each padding token.

    q and k are scaled to length 1 (eps 1e-6 under the root), q then by K ** -0.5.

    Args:
        lengths: of the documents of every row.
    Returns:
        [B, S, H, V].
    """
    B, S, H, V = x.v.shape
    q, k = (y * (y.square().sum(-1, keepdim=True) + 1e-6) ** -0.5 for y in (x.q, x.k))
    q, k = (y.repeat_interleave(H // y.shape[2], dim=2) for y in (q * q.shape[-1] ** -0.5, k))
    rows = []
    for b in range(B):
        starts, out = document_starts(lengths[b], S), []
        state = q.new_zeros(H, q.shape[-1], V)
        for t in range(S):
            kept = (
                torch.zeros_like(state) if t in starts else state * x.g[b, t].exp().view(H, -1, 1)
            )
            held = torch.einsum("hkv,hk->hv", kept, k[b, t])
            new = x.beta[b, t, :, None] * (x.v[b, t] - held)
            state = kept + torch.einsum("hk,hv->hkv", k[b, t], new)
            out.append(torch.einsum("hkv,hk->hv", state, q[b, t]))
        rows.append(torch.stack(out))
    return torch.stack(rows)


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, lengths: Sequence[Sequence[int]]
) -> Tensor:
    """The recurrence token by token, from nothing at each document and each padding token.

    Args:
        q, k: [B, S, G, K], q scaled.
        v: [B, S, H, V].
        g: [B, S, H], or [B, S, H, K] of key channels.
        lengths: of the documents of every row.
    Returns:
        [B, S, H, V].
    """
    B, S, H, V = v.shape
    q, k = (y.repeat_interleave(H // y.shape[2], dim=2) for y in (q, k))
    rows = []
    for b in range(B):
        starts, out = document_starts(lengths[b], S), []
        state = q.new_zeros(H, q.shape[-1], V)
        for t in range(S):
            state = torch.zeros_like(state) if t in starts else state * g[b, t].exp().view(H, -1, 1)
            state = state + torch.einsum("hk,hv->hkv", k[b, t], v[b, t])
            out.append(torch.einsum("hkv,hk->hv", state, q[b, t]))
        rows.append(torch.stack(out))
    return torch.stack(rows)


def causal_conv(x: Tensor, weight: Tensor, lengths: Sequence[Sequence[int]]) -> Tensor:
    """Taps over what came before in the document: x [B, S, C], weight [C, w] -> [B, S, C]."""
    B, S, _ = x.shape
    rows = []
    for b in range(B):
        starts, out = document_starts(lengths[b], S), []
        for t in range(S):
            total = torch.zeros_like(x[b, t])
            for back in range(weight.shape[1]):
                if t - back < 0:
                    break
                total = total + weight[:, weight.shape[1] - 1 - back] * x[b, t - back]
                if t - back in starts:
                    break
            out.append(total)
        rows.append(torch.stack(out))
    return torch.stack(rows)


def document_starts(lengths: Sequence[int], seq_len: int) -> set[int]:
    """Positions at which a document starts; a padding token is one by itself."""
    starts, end = set(), 0
    for length in lengths:
        starts.add(end)
        end += length
    return starts | set(range(end, seq_len))
