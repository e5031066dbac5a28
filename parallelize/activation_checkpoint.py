"""What a block keeps for its backward pass, and what it recomputes there."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from dtcp._torch.ops import TorchDispatchMode
from dtcp.distributed.ops import selective_checkpoint_save_ops

Forward = Callable[..., Any]


@dataclass(frozen=True)
class NoCheckpoint:
    """Keep every activation."""

    def keeping_routes(self) -> "NoCheckpoint":
        """The same: nothing is recomputed."""
        return self

    def wrap(self, forward: Forward) -> Forward:
        return forward


@dataclass(frozen=True)
class FullCheckpoint:
    """Keep only a block's inputs; recompute, and communicate again, everything else.

    Args:
        routes: keep which experts tokens went to, too, and where: a few numbers per token. Set by
            `parallelize` for blocks whose experts are on other ranks.
    """

    routes: bool = field(default=False, kw_only=True)

    def keeping_routes(self) -> "FullCheckpoint":
        """The same for a block of experts: recomputed, its tokens take the routes they took."""
        return replace(self, routes=True)

    def wrap(self, forward: Forward) -> Forward:
        # Not closures over the forward: a deep copy of the block checkpoints its own.
        if not self.routes:
            return partial(checkpoint, forward, use_reentrant=False)
        contexts = partial(_contexts, _keep_routes)
        return partial(checkpoint, forward, use_reentrant=False, context_fn=contexts)


@dataclass(frozen=True)
class SelectiveCheckpoint:
    """Keep what was communicated and every `matmul_every`-th matmul; recompute the rest.

    Attention across ranks is not run again: an op that communicates is kept whole.

    Args:
        routes: as of FullCheckpoint.
    """

    matmul_every: int = 2
    routes: bool = field(default=False, kw_only=True)

    def keeping_routes(self) -> "SelectiveCheckpoint":
        """The same for a block of experts: recomputed, its tokens take the routes they took."""
        return replace(self, routes=True)

    def __post_init__(self) -> None:
        if self.matmul_every < 1:
            raise ValueError(
                f"SelectiveCheckpoint keeps every n-th matmul, got "
                f"matmul_every={self.matmul_every}: give 1 to keep all, 2 for every other one."
            )

    def wrap(self, forward: Forward) -> Forward:
        kept = frozenset([*selective_checkpoint_save_ops(), *_TENSOR_PARALLEL])
        if self.routes:
            kept |= _routing_ops()

        def contexts() -> Any:
            return _contexts(_Policy(kept, self.matmul_every))

        return partial(checkpoint, forward, use_reentrant=False, context_fn=contexts)


def has_selective_blocks(model: nn.Module) -> bool:
    """Whether a module of a model keeps some of what is in it: torch recomputes such once."""
    forwards = [vars(module).get("forward") for module in model.modules()]
    wrapped = [f for f in forwards if isinstance(f, partial) and f.func is checkpoint]
    return any("context_fn" in each.keywords for each in wrapped)


ActivationCheckpoint = NoCheckpoint | FullCheckpoint | SelectiveCheckpoint
KINDS = (NoCheckpoint, FullCheckpoint, SelectiveCheckpoint)

_MATMULS = frozenset(
    [torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default]
)

# The collectives of tensor parallelism. DTensor has no public list of them (torch 2.11 to 2.15).
_TENSOR_PARALLEL = (
    torch.ops._c10d_functional.all_reduce.default,
    torch.ops._c10d_functional.reduce_scatter_tensor.default,
    torch.ops._c10d_functional.all_gather_into_tensor.default,
)


def _contexts(policy: Any) -> tuple[Any, Any]:
    """Those of a forward pass and of its recomputation, for torch's checkpoint."""
    forward, again = create_selective_checkpoint_contexts(policy)
    return _CopiedChoice(forward), _CopiedChoice(again)


class _CopiedChoice(TorchDispatchMode):
    """Hands on a copy of what was chosen, above a mode that keeps it.

    Many routers of transformers divide the weights of the chosen experts in place: what is kept for
    the backward pass would be divided, too, and torch refuses it.
    """

    def __init__(self, keeping: Any) -> None:
        super().__init__()
        self.keeping = keeping

    @property
    def ac_graph_id(self) -> Any:
        """Of the mode below: the compiler numbers each checkpointed block by it."""
        return self.keeping.ac_graph_id

    @ac_graph_id.setter
    def ac_graph_id(self, number: int) -> None:
        self.keeping.ac_graph_id = number

    def __enter__(self) -> "_CopiedChoice":
        self.keeping.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.keeping.__exit__(*error)

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        # As the mode below; compiled blocks are traced under both.
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.topk.default:
            return tuple(x.clone() for x in out)
        return out


def _routing_ops() -> frozenset[Any]:
    """What decides where tokens go: the choice of experts, and the exchange of counts.

    A choice that is made again may fall otherwise where two scores are nearly the same, and the
    counts of its ranks would no longer fit the gradients. A library of kernels exchanges counts
    and tokens at once: there the tokens that arrived are kept as well.
    """
    ops = torch.ops.dtcp
    exchanges = [ops.route_tokens.default, ops.library_dispatch.default]
    return frozenset([torch.ops.aten.topk.default, *exchanges])


def _keep_routes(
    ctx: SelectiveCheckpointContext, op: Any, *args: Any, **kwargs: Any
) -> CheckpointPolicy:
    keep = op in _routing_ops()
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


class _Policy:
    """The decisions for one block; forward and recomputation count their matmuls alike."""

    def __init__(self, kept: frozenset[Any], matmul_every: int) -> None:
        self.kept, self.matmul_every = kept, matmul_every
        self.matmuls: Counter[bool] = Counter()

    def __call__(
        self, ctx: SelectiveCheckpointContext, op: Any, *args: Any, **kwargs: Any
    ) -> CheckpointPolicy:
        keep = op in self.kept
        if op in _MATMULS:
            self.matmuls[ctx.is_recompute] += 1
            keep = self.matmuls[ctx.is_recompute] % self.matmul_every == 0
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE
