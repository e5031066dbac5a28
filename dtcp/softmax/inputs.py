"""What attention is of, and what refuses inputs that do not fit together."""

from typing import Any, NamedTuple

from torch import Tensor

from dtcp.kernels.dtypes import accumulation
from dtcp.kernels.softmax.api import Queries, ScoreBias
from dtcp.sequence.arguments import FLOATS, check_tensor
from dtcp.softmax.latent import LatentWidths
from dtcp.softmax.metadata import KeyExchangeMetadata, LocalMetadata

SCORE_BIAS = ("bias", "slope", "relative", "profiles")
"""The inputs of attention that are added to scores by distance."""


class AttentionInputs(NamedTuple):
    """What attention is of, as plain local tensors; or the gradients of these.

    A key and a value of its own, or what they are made from, with k None: a value whose key is
    rotate(v * key_scale), or a latent, whose keys and values of all heads `up` makes (latent.py).
    """

    q: Tensor  # [B, L, H, D]
    k: Tensor | None  # [B, L, G, D]
    v: Tensor  # [B, L, G, V]; of a latent [B, L, 1, C + R]
    sink: Tensor | None = None  # [H], or of each query [B, L, H]
    key_scale: Tensor | None = None  # [D]
    up: Tensor | None = None  # [H, N + V, C], D = N + R
    bias: Tensor | None = None  # [H, 2 R + 1], by distance (score_bias.py)
    slope: Tensor | None = None  # [H]
    relative: Tensor | None = None  # [B, L, H, C], of queries
    profiles: Tensor | None = None  # [C, W], by distance
    frequency: Tensor | None = None  # [D / 2]; has no gradient

    @property
    def value_width(self) -> int:
        """Channels of a head of the output."""
        if self.up is None:
            return self.v.shape[-1]
        return LatentWidths.of(self.q, self.v, self.up).value

    @property
    def of_tokens(self) -> tuple[str, ...]:
        """Names of those that have a row for each token."""
        names = ("q", "k", "v", "relative", *(("sink",) if self.has_own_sinks else ()))
        return tuple(name for name in names if getattr(self, name) is not None)

    @property
    def per_head(self) -> tuple[str, ...]:
        """Names of those that have a row for each head, and none for tokens."""
        names = ("bias", "slope", *(() if self.has_own_sinks else ("sink",)))
        return tuple(name for name in names if getattr(self, name) is not None)

    @property
    def has_own_sinks(self) -> bool:
        """Whether each query has sinks of its own."""
        return isinstance(self.sink, Tensor) and self.sink.ndim == 3

    @property
    def beside_queries(self) -> list[Tensor]:
        """What goes with queries where these travel: [B, L, H, channels] each."""
        sinks = [self.sink[..., None]] if self.sink is not None and self.has_own_sinks else []
        return sinks if self.relative is None else [self.relative, *sinks]

    def queries(self, metadata: LocalMetadata | KeyExchangeMetadata) -> Queries:
        """Local queries, what each of them sees, and what is added to its scores."""
        bias, parts = None, [getattr(self, name) for name in SCORE_BIAS]
        if any(each is not None for each in parts):
            index = metadata.query_token_index
            bias = ScoreBias(*parts, query_index=index, dtype=self.q.dtype)
        return Queries.of(self.q, metadata.first_key, metadata.last_key, bias)

    def empty_lse(self) -> Tensor:
        """Of the shape and the dtype of what a forward keeps beside its output: [B, L, H]."""
        return self.q.new_empty(self.q.shape[:-1], dtype=accumulation(self.q.dtype))


def check_inputs(x: AttentionInputs, *, keys_sum_grads: bool = False) -> None:
    """Refuse inputs that do not fit together, on all ranks alike and before anything moves.

    How many tokens there are is checked where the metadata are read.

    Args:
        keys_sum_grads: as of AttentionOp.
    """
    named: dict[str, Any] = {"q": x.q, "k": x.k, "v": x.v}
    if x.up is not None:
        named["up"] = x.up
    if x.k is None and (x.key_scale is not None or x.up is not None):
        del named["k"]
    check_tensor("Attention", **named)
    dtypes = {name: each.dtype for name, each in named.items()}
    named.pop("up", None)
    shapes = {name: tuple(each.shape) for name, each in named.items()}
    if any(len(shape) != 4 for shape in shapes.values()):
        raise ValueError(
            f"Attention takes q [B, L, H, D], k [B, L, G, D] and v [B, L, G, V], got {shapes}: "
            f"give each its heads' dim."
        )
    expected = dict.fromkeys(dtypes, x.q.dtype)
    if keys_sum_grads:
        expected |= dict.fromkeys(dtypes.keys() - {"q", "up"}, accumulation(x.q.dtype))
    if keys_sum_grads and dtypes != expected:
        raise TypeError(
            f"Keys gathered with reduce_dtype=torch.float32 stay in the dtype in which layers sum "
            f"their gradients, got {dtypes}: leave out what converts them before attention."
        )
    if dtypes != expected or x.q.dtype not in FLOATS:
        raise TypeError(
            f"Attention computes in one floating dtype, got {dtypes}: convert q, k and v to one "
            f"of at least 16 bits."
        )
    if x.up is not None:
        LatentWidths.of(x.q, x.v, x.up)
        return
    key_width = x.v.shape[3] if x.k is None else x.k.shape[3]
    # Compared, not put in a set: sizes that a graph does not know have no hash.
    of_keys = [shape[:3] for name, shape in shapes.items() if name != "q"]
    if any(shape != of_keys[0] for shape in of_keys) or x.q.shape[0] != x.v.shape[0]:
        raise ValueError(
            f"Keys and values are of the same tokens and heads, in the rows of the queries, got "
            f"{shapes}: give k and v one [B, L, G], and q the same B."
        )
    if x.q.shape[2] % x.v.shape[2] or x.q.shape[3] != key_width:
        raise ValueError(
            f"Each kv head serves as many query heads, of its own width, got {shapes}: give q as "
            f"[B, L, H, D] with H a multiple of the G kv heads and D the keys' width."
        )
    if x.has_own_sinks:
        _check_own_sinks(x)
    else:
        check_sink(x.sink, x.q.shape[2])
    _check_bias(x)
    _check_relative(x)


def check_sink(sink: Tensor | None, heads: int) -> None:
    """Refuse sinks that are not one number for each of so many query heads."""
    if sink is None:
        return
    check_tensor("Attention", dtypes=FLOATS, sink=sink)
    if sink.shape != (heads,):
        raise ValueError(
            f"A sink is one score per query head, got sink.shape={tuple(sink.shape)} with "
            f"{heads} heads: give [H]."
        )


def _check_own_sinks(x: AttentionInputs) -> None:
    assert x.sink is not None
    check_tensor("Attention", sink=x.sink)
    if x.sink.shape != x.q.shape[:3] or x.sink.dtype != x.q.dtype:
        raise ValueError(
            f"Queries with sinks of their own have one per head, in their dtype, got sink.shape="
            f"{tuple(x.sink.shape)} of {x.sink.dtype} with q.shape={tuple(x.q.shape)} of "
            f"{x.q.dtype}: give [B, L, H], or [H] for all queries."
        )


def _check_bias(x: AttentionInputs) -> None:
    heads = x.q.shape[2]
    for name, each in (("bias", x.bias), ("slope", x.slope)):
        named: dict[str, Any] = {} if each is None else {name: each}
        check_tensor("A score bias", dtypes=FLOATS, **named)
    if x.slope is not None and x.slope.shape != (heads,):
        raise ValueError(
            f"A slope is one number per query head, got slope.shape={tuple(x.slope.shape)} with "
            f"{heads} heads: give [H]."
        )
    shape = () if x.bias is None else tuple(x.bias.shape)
    if x.bias is not None and (len(shape) != 2 or shape[0] != heads or shape[1] % 2 == 0):
        raise ValueError(
            f"A bias has a number per query head and distance, from -R to R tokens, got bias.shape="
            f"{shape} with {heads} heads: give [H, 2 R + 1] (t5_distance_bias makes T5's)."
        )


def _check_relative(x: AttentionInputs) -> None:
    named = {"relative": x.relative, "profiles": x.profiles}
    given: dict[str, Any] = {name: each for name, each in named.items() if each is not None}
    if not given:
        return
    check_tensor("A relative bias", dtypes=FLOATS, **given)
    shapes = {name: tuple(each.shape) for name, each in given.items()}
    of_queries, by_distance = shapes.get("relative", ()), shapes.get("profiles", ())
    if x.relative is not None and x.relative.dtype != x.q.dtype:
        raise TypeError(
            f"Queries mix profiles in their own dtype, got relative of {x.relative.dtype} with q "
            f"of {x.q.dtype}: convert one."
        )
    fits = len(of_queries) == 4 and of_queries[:3] == tuple(x.q.shape[:3])
    if not fits or len(by_distance) != 2 or by_distance[0] != of_queries[3] or not by_distance[1]:
        raise ValueError(
            f"Each query mixes profiles of a bias by distance, got {shapes} with q.shape="
            f"{tuple(x.q.shape)}: give both, relative [B, L, H, C] and profiles [C, W]."
        )


def check_key_count(x: AttentionInputs, expected: int) -> None:
    """Refuse more or fewer keys than the metadata are of: some would be left out without a word."""
    if x.v.shape[1] != expected:
        raise ValueError(
            f"Attention reads the keys of its own batch, got {x.v.shape[1]} keys where the batch "
            f"has {expected}: give every token its key, [B, L, G, D], and attend to the keys of "
            f"another sequence by CrossAttention."
        )
