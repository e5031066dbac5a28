"""Cases for kernels with a score bias, and their errors against dense attention in fp64.

They call `dtcp.kernels.softmax.api.attend`, below the mixers: with any queries, and with keys in
several parts, as a ring brings them.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dtcp.kernels.softmax.api import (
    GradAccumulators,
    Keys,
    OnlineSoftmax,
    Queries,
    SavedForward,
    ScoreBias,
    SoftmaxParams,
    attend,
    attend_backward,
    attention_kernel,
    local_sink_gradient,
    zeros_for,
)
from dtcp.kernels.softmax.block_ranges import UNUSED, block_ranges
from dtcp.kernels.softmax.score_bias import PARTS
from dtcp.sequence.layout import HeadTail
from tests.harness.kernel_cases import relative_error

SCALE = 0.3
DOCUMENTS = (0, 13, 14, 47)
"""Where documents of a packed row start."""


@dataclass(frozen=True)
class BiasedCase:
    """Attention with a bias by distance: how far each of its parts reaches, or None.

    Args:
        reach: of a table, R.
        width: of profiles, W.
        window: tokens left of a query that it sees besides itself.
        parts: of the keys, one after another; each holds every so many-th token.
        ranks: of head-tail shards of the queries, which are those of the first.
        hides: whether the table hides far keys from the first head.
    """

    reach: int | None = None
    slope: bool = False
    width: int | None = None
    seq_len: int = 70
    causal: bool = True
    packed: bool = False
    window: int = 1000
    heads: int = 2
    kv_heads: int = 1
    key_dim: int = 16
    value_dim: int = 16
    softcap: float = 0.0
    parts: int = 1
    ranks: int = 1
    unused: int = 0
    hides: bool = False
    dtype: torch.dtype = torch.float32


def biased_cases() -> dict[str, BiasedCase]:
    """Each part of a bias alone and all at once, reaching less, as much and more than a tile."""
    return {
        "slope": BiasedCase(slope=True, packed=True),
        "slope, ring, head-tail": BiasedCase(slope=True, parts=2, ranks=2, unused=9, seq_len=80),
        "table, in goes": BiasedCase(reach=9, causal=False, packed=True, heads=4, kv_heads=2),
        "table of one number": BiasedCase(reach=0, causal=False, seq_len=40),
        "table beyond the row": BiasedCase(reach=80, causal=False, seq_len=40, softcap=1.5),
        "table that hides keys": BiasedCase(reach=5, causal=False, hides=True, seq_len=100),
        "profiles": BiasedCase(width=7, packed=True, heads=4, kv_heads=2),
        "profiles of one token": BiasedCase(width=1, seq_len=40),
        "profiles of a tile": BiasedCase(width=32, seq_len=110, key_dim=24, value_dim=5),
        "profiles beyond the row": BiasedCase(width=90, window=33, causal=False),
        "profiles, ring, head-tail, in goes": BiasedCase(
            width=20, parts=2, ranks=2, unused=5, seq_len=80, window=40
        ),
        "all, ring, in goes": BiasedCase(
            3, True, 11, causal=False, parts=3, softcap=2.0, packed=True
        ),
        "half, all": BiasedCase(
            20, True, 70, seq_len=160, dtype=torch.float16, key_dim=64, value_dim=64
        ),
    }


def inputs_of(case: BiasedCase) -> dict[str, Tensor]:
    """In fp64, of numbers that the case's dtype holds."""
    generator = torch.Generator().manual_seed(5)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(case.dtype).double()

    S, H, G = case.seq_len, case.heads, case.kv_heads
    inputs = {
        "q": draw(2, S, H, case.key_dim),
        "k": draw(2, S, G, case.key_dim),
        "v": draw(2, S, G, case.value_dim),
        "sink": draw(H),
    }
    if case.reach is not None:
        inputs["table"] = draw(H, 2 * case.reach + 1)
        if case.hides:
            inputs["table"][0, : case.reach - 2] = -torch.inf
    if case.slope:
        inputs["slope"] = draw(H) / 8
    if case.width is not None:
        inputs["relative"], inputs["profiles"] = draw(2, S, H, 3), draw(3, case.width)
    return inputs


def visible_of(case: BiasedCase) -> Tensor:
    """[S, S] bool."""
    token = torch.arange(case.seq_len)
    starts = torch.tensor(DOCUMENTS if case.packed else (0,))
    document = (token[:, None] >= starts).sum(1)
    distance = token - token[:, None]
    seen = (document == document[:, None]) & (distance >= -case.window)
    return seen & (distance <= 0) if case.causal else seen


@torch.enable_grad()
def expected(case: BiasedCase) -> tuple[dict[str, Tensor], Tensor]:
    """out and the gradient of every input by name, and the gradient of out [B, S, H, V]."""
    x = {name: each.requires_grad_() for name, each in inputs_of(case).items()}
    S, own = case.seq_len, queries_of(case)
    k, v = (x[name].repeat_interleave(case.heads // case.kv_heads, 2) for name in "kv")
    scores = torch.einsum("bqhd,bkhd->bhqk", x["q"], k) * SCALE
    if case.softcap:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    distance = torch.arange(S) - torch.arange(S)[:, None]
    if case.reach is not None:
        scores = scores + x["table"][:, distance.clamp(-case.reach, case.reach) + case.reach]
    if case.slope:
        scores = scores + x["slope"][:, None, None] * distance
    for back in range(min(case.width or 0, S)):
        added = torch.einsum("bqhc,c->bhq", x["relative"], x["profiles"][:, back])
        scores = scores + torch.where(distance == -back, added[..., None], 0.0)
    scores = scores.masked_fill(~visible_of(case), -torch.inf)
    sink = x["sink"].view(1, -1, 1, 1).expand(2, -1, S, 1)
    weights = torch.cat((scores, sink), -1).softmax(-1)[..., :S]
    out = torch.einsum("bhqk,bkhd->bqhd", weights, v)
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(case.dtype)
    own_grad = torch.zeros_like(out).index_copy(1, own, grad_out[:, own].double())
    grads = torch.autograd.grad(out, list(x.values()), own_grad)
    return {"out": out.detach()[:, own], **dict(zip(x, grads, strict=True))}, grad_out


def queries_of(case: BiasedCase) -> Tensor:
    """Token indices of the queries that are computed."""
    return HeadTail(case.seq_len, case.ranks).token_indices(0)


def computed(case: BiasedCase, grad_out: Tensor, device: str, kernel: str) -> dict[str, Tensor]:
    """The same by a backend: forward over every part's keys in turn, then backward."""
    own, visible = queries_of(case), visible_of(case)
    x = {name: each.to(device, case.dtype) for name, each in inputs_of(case).items()}
    first = visible.int().argmax(1).int()[None, own]
    last = (case.seq_len - 1 - visible.flip(1).int().argmax(1)).int()[None, own]
    of_queries = {name: x[name][:, own] for name in ("q", "relative") if name in x}
    parts = ((x | of_queries).get(name) for name in PARTS)
    q = of_queries["q"]
    bias = ScoreBias(*parts, query_index=own.int().to(device), dtype=case.dtype)
    queries = Queries.of(q, first.to(device), last.to(device), bias)
    params = SoftmaxParams(SCALE, case.softcap, kernel)
    state = OnlineSoftmax.empty(q, case.value_dim)
    lined_up = list(_parts(case, x["k"], x["v"], first, last))
    for _, keys in lined_up:
        assert type(attention_kernel(queries, keys, params)).__name__.lower().startswith(kernel)
        attend(state, queries, keys, params)
    out, lse = state.finish(x["sink"], case.dtype)
    saved = SavedForward(grad_out[:, own].to(device), out, lse)
    own_dq, dq, dk, dv = (zeros_for(each) for each in (q, *(x[name] for name in "qkv")))
    for tokens, keys in lined_up:
        grads = GradAccumulators(own_dq, zeros_for(keys.k), zeros_for(keys.v))
        attend_backward(grads, saved, queries, keys, params)
        dk[:, tokens], dv[:, tokens] = grads.dk[:, : len(tokens)], grads.dv[:, : len(tokens)]
    dq[:, own] = own_dq
    results = {"out": out, "q": dq, "k": dk, "v": dv, "sink": local_sink_gradient(saved, x["sink"])}
    for name, each in zip(PARTS, bias.gradients, strict=True):
        if name == "relative" and each is not None:
            each = torch.zeros(x[name].shape, device=device).index_copy(1, own.to(device), each)
        results |= {} if each is None else {name: each}
    return {name: each.cpu() for name, each in results.items()}


def _parts(
    case: BiasedCase, k: Tensor, v: Tensor, first: Tensor, last: Tensor
) -> Iterator[tuple[Tensor, Keys]]:
    """The tokens of each part, and its keys with empty slots behind."""
    for part in range(case.parts):
        tokens = torch.arange(part, case.seq_len, case.parts)
        index = torch.nn.functional.pad(tokens, (0, case.unused), value=UNUSED).int()
        padding = (0, 0, 0, 0, 0, case.unused)
        slots = (torch.nn.functional.pad(x[:, tokens], padding) for x in (k, v))
        yield tokens, Keys(*slots, index.to(k.device), block_ranges(first, last, index))


def biased_errors(
    case: BiasedCase, device: str = "cpu", kernel: str = "triton"
) -> dict[str, float]:
    """The relative error of each result."""
    right, grad_out = expected(case)
    ours = computed(case, grad_out, device, kernel)
    assert ours.keys() == right.keys()
    return {name: relative_error(ours[name], each) for name, each in right.items()}
