"""Dropout that drops the same of a token wherever the token lies.

A generator draws for the places of a tensor, and a sharded row has its tokens at other places. Here
what is dropped is worked out, not drawn: of a number for the batch (drawn on the host, one for all
ranks that share its rows), the token's place in its row, the module's name and the channel, all
mixed until each bit of the result depends on each bit of them. So it is the same on one device and
on any mesh, in any layout, compiled or not, and once more where a block is recomputed; nothing is
kept or sent for it.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from dtcp.distributed.same_rows import numbers_of_ranks
from dtcp.metadata import BatchMetadata
from dtcp.sequence.arguments import check_kind
from dtcp.sequence.host import on_host

MIXED = ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1))
"""Shifts and factors that mix 64 bits (the last step of SplitMix64, Steele et al. 2014)."""
SPREAD, FIRST, SECOND = -0x61C88647, 0x7FEB352D, -0x7B935975
"""Odd factors of 32 bits: 2^32 divided by the golden ratio, and two found by search (lowbias32)."""


class TokenDropout(nn.Dropout):
    """Drops each channel of each token with probability p in training, and scales what is left.

    In a model of your own, called with the metadata of its batch: `self.drop(x, attn_metadata)`. A
    batch has what it reads where it was made for the model, in training mode: by `shard_batch`
    (with `model`), `shard_hf_batch` or `batch_metadata`. What is dropped follows
    `torch.manual_seed`; two calls of one module on one batch drop the same. Of a rank that has
    some channels alone, x is a DTensor, which says which. It is an nn.Dropout to code that looks
    for those to set their rate, as TRL's `disable_dropout` does.

    Args:
        p: from 0 to 1.
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        check_kind("TokenDropout", (int, float), p=p)
        if not 0 <= p <= 1:
            raise ValueError(f"TokenDropout drops with a probability, got p={p}: give 0 to 1.")
        self.p = float(p)
        self.number: Tensor | None = None
        self.scope: DropoutScope | None = None
        self.of_memory = self.called_again = False
        self.width: int | None = None
        self.tp_rank, self.tp_size = 0, 1

    def forward(self, x: Tensor, attn_metadata: BatchMetadata | None = None) -> Tensor:
        """x of this rank's tokens, [B, L, ..] or [B * L, C]; the same shape comes out."""
        if not self.training or self.p == 0:
            return x
        if self.p == 1:
            return x * 0.0
        batch = attn_metadata
        if batch is None and self.scope is not None:
            batch = self.scope.batch
        if batch is not None and self.of_memory and batch.memory is not None:
            batch = batch.memory
        if batch is None or batch.token_keys is None or self.number is None:
            raise ValueError(_unknown(self, batch))
        local = x.to_local() if isinstance(x, DTensor) else x
        keys = self._of_tokens(local, batch.token_keys)
        number = self.number
        if self.called_again and self.scope is not None:
            number = number ^ self.scope.call_of(self)
        keep = kept(keys, number, self._channels(x, local, keys), self.p).view(local.shape)
        if isinstance(x, DTensor):
            # Of sums that are yet to be made each part loses the same.
            placements = [Replicate() if p.is_partial() else p for p in x.placements]
            keep = DTensor.from_local(keep, x.device_mesh, placements, run_check=False)
        return (x * (1 / (1 - self.p))).masked_fill(~keep, 0.0)

    def _of_tokens(self, x: Tensor, keys: Tensor) -> Tensor:
        """The keys of the tokens in the first dims of x."""
        if x.shape[:2] == keys.shape:
            return keys
        if x.ndim == 2 and x.shape[0] == keys.numel():
            return keys.reshape(-1)
        raise ValueError(
            f"TokenDropout drops channels of the tokens of its batch, got x.shape="
            f"{tuple(x.shape)} for tokens {tuple(keys.shape)}: give [B, L, C]."
        )

    def _channels(self, x: Tensor, local: Tensor, keys: Tensor) -> Tensor:
        """The number of each channel in all of them: [C] int32."""
        own = local.shape[keys.ndim :].numel()
        width, rank, size = self.width or own, self.tp_rank, self.tp_size
        if isinstance(x, DTensor):
            width = x.shape[keys.ndim :].numel()
            for axis, placement in enumerate(x.placements):
                if isinstance(placement, Shard) and placement.dim % x.ndim >= keys.ndim:
                    rank, size = x.device_mesh.get_local_rank(axis), x.device_mesh.size(axis)
        if own not in (width, width / size):
            raise ValueError(
                f"Under tp a rank has all channels or an equal part of them, got {own} of {width} "
                f"on one of {size} ranks: set p={self.p} to 0."
            )
        first = 0 if own == width else rank * own
        return torch.arange(first, first + own, dtype=torch.int32, device=x.device)

    def extra_repr(self) -> str:
        return f"p={self.p}"


class DropoutScope:
    """The batch that a forward is running on: for modules that are given activations alone.

    Args:
        called: those of the modules that one forward calls several times, as often as it has.
    """

    def __init__(self) -> None:
        self.batch: BatchMetadata | None = None
        self.called: list[TokenDropout] = []

    def call_of(self, module: TokenDropout) -> int:
        """How often this forward has called a module before."""
        before = sum(1 for each in self.called if each is module)
        self.called.append(module)
        return before

    @contextmanager
    def noting(self, *arguments: Any) -> Iterator[None]:
        """Inside, the batch is the one whose metadata are among the arguments, if any are."""
        given = [x for x in arguments if isinstance(x, BatchMetadata)]
        if not given:
            yield
            return
        before = self.batch, self.called
        self.batch, self.called = given[0], []
        try:
            yield
        finally:
            self.batch, self.called = before


SCOPE = "dtcp_dropout_scope"
"""Where a block keeps the scope of the dropouts inside of it."""


class ForwardOnBatch:
    """The forward of a block; meanwhile, the dropouts inside of it know the batch.

    It goes around a compiled forward, for a graph that recomputes its block sets nothing; and into
    an eager checkpoint, so that the block knows its batch once more.
    """

    def __init__(self, scope: DropoutScope, forward: Callable[..., Any]) -> None:
        self.scope, self.forward = scope, forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.scope.noting(*args, *kwargs.values()):
            return self.forward(*args, **kwargs)


def without_scope(forward: Any) -> Any:
    """A block's forward as it is without what notes its batch."""
    return forward.forward if isinstance(forward, ForwardOnBatch) else forward


def kept(keys: Tensor, number: Tensor, channels: Tensor, p: float) -> Tensor:
    """Which channels of which tokens are kept: [.., C] bool.

    Args:
        keys: [..] int64, of each token.
        number: [] int64, of the module.
        channels: [C] int32.
        p: above 0 and below 1.
    """
    keys = mixed(keys ^ number)[..., None]
    # Both halves count, at two steps: no token's channels are another one's, shifted.
    low, high = keys.to(torch.int32), (keys >> 32).to(torch.int32)
    x = _folded(channels * SPREAD + low, 16).mul_(FIRST).bitwise_xor_(high)
    x = _folded(_folded(x, 15).mul_(SECOND), 16)
    return x >= min(round(p * 2**32), 2**32 - 1) - 2**31


def _folded(x: Tensor, shift: int) -> Tensor:
    """Numbers of 32 bits with their upper bits laid over the lower ones, in place: it is large."""
    return x.bitwise_xor_((x >> shift).bitwise_and_((1 << 32 - shift) - 1))


def mixed(x: Tensor) -> Tensor:
    """Numbers of 64 bits of which each bit depends on all bits of x; others of others."""
    for shift, factor in MIXED:
        # Shifts of signed numbers bring their sign along.
        x = (x ^ (x >> shift & (1 << 64 - shift) - 1)) * factor
    return x


def token_keys(seed: Tensor, rows: Tensor, token_index: Tensor) -> Tensor:
    """What tells tokens apart in one batch: [B, L] int64.

    Args:
        seed: [] int64, of the batch.
        rows: [B] int64, their numbers in the batch of all batch ranks.
        token_index: [B, L] or [L] int64, of each token in its row.
    """
    return mixed(mixed(mixed(seed) ^ rows)[:, None] ^ token_index)


def step_seed(seed: int, step: int) -> int:
    """What to seed torch with before a step, that a run which goes on drops what it would have."""
    return int(mixed(mixed(torch.tensor([seed % 2**63], device="cpu")) ^ step))


@on_host
def drawn_seed(axes: Sequence[DeviceMesh | None] = (), *, drops: bool = True) -> Tensor | None:
    """A number for a batch, by torch's generator of the host: that of the first rank of the axes.

    Traffic per rank: one number from each rank, in one all_gather per axis.

    Args:
        drops: whether this rank needs one: None where no rank does.
    Raises:
        ValueError: ranks of which some do; on all of them.
    """
    seed = torch.randint(2**63 - 1, (1,)) if drops else torch.tensor([-1])
    wide = [axis for axis in axes if isinstance(axis, DeviceMesh) and axis.size() > 1]
    of_ranks = numbers_of_ranks(seed, wide).view(-1)
    need = (of_ranks >= 0).tolist()
    if len({*need}) > 1:
        raise ValueError(
            f"Ranks that share rows drop all, or none does, got TokenDropout in training mode, "
            f"with p above 0, on {need.count(True)} of {len(need)} ranks: call model.train() or "
            f"model.eval() on all of them."
        )
    return of_ranks[0] if drops else None


def numbered(model: nn.Module) -> tuple[TokenDropout, ...]:
    """The modules of a model that drop by token; each has the number of its name from now on.

    Pipeline stages come in an nn.ModuleList: what they call a module counts, without the place of
    its stage there, where that tells all modules apart.
    """
    found = [(name, x) for name, x in model.named_modules() if isinstance(x, TokenDropout)]
    if isinstance(model, nn.ModuleList):
        of_stages = [(name.partition(".")[2], x) for name, x in found]
        found = of_stages if len(dict(of_stages)) == len(found) else found
    for name, module in found:
        if module.number is None:
            digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
            # No number of Python: graphs would hold it, one for each layer.
            number = int.from_bytes(digest, "little", signed=True)
            module.number = torch.tensor(number, device="cpu")
    return tuple(module for _, module in found)


def any_drops(dropouts: Iterable[TokenDropout]) -> bool:
    """Whether a batch for them needs keys of its tokens."""
    return any(each.training and each.p > 0 for each in dropouts)


def calls_again(block: nn.Module) -> bool:
    """Whether one forward of a block calls a dropout several times."""
    return any(isinstance(x, TokenDropout) and x.called_again for x in block.modules())


def leave_out_dropout(model: nn.Module) -> None:
    """Let nothing of a model drop by token, where it is compared or planned, not trained."""
    for module in model.modules():
        if isinstance(module, TokenDropout):
            module.p = 0.0


def _unknown(module: TokenDropout, batch: Any) -> str:
    got = "no batch" if batch is None else f"{type(batch).__name__} without keys of its tokens"
    return (
        f"TokenDropout(p={module.p}) drops by the tokens of a batch that was made for its model in "
        f"training mode, got {got}: call model.train() first, then shard_hf_batch or "
        f"shard_batch(.., model=model), and pass attn_metadata on to it."
    )
