"""Routers whose experts have a capacity: they take the first tokens of a row that choose them.

Switch Transformers counts along a row how many tokens have chosen each expert; a token whose
position in its expert is past the capacity is dropped. Tokens of other ranks count, too, so tokens
meet here: a mixer counts, and the router's own forward does the rest.
From Fedus et al. 2021, Switch Transformers, section 2.2, https://arxiv.org/abs/2101.03961
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dtcp.distributed.collectives import all_gather
from dtcp.forward import wrap_forward
from dtcp.huggingface.recurrent_layers import SurveyedMixer
from dtcp.huggingface.registry import MIXER
from dtcp.metadata import AttentionMetadata, BatchMetadata
from dtcp.mixer import ClaimedMixer, Mixer
from dtcp.sequence.coords import Coords
from dtcp.sequence.layout import SequenceLayout
from dtcp.style import MixerStyle

CAPACITY = "expert_capacity"
"""The attribute by which such routers are known."""


@dataclass(frozen=True, eq=False)
class PositionInExpertMetadata(AttentionMetadata):
    """The order in which tokens choose.

    Args:
        slot: [S], where each token of a row lies among those of all ranks.
        token_index: [L], of this rank's tokens.
        document: [B, S], of each token of a row, padding in one of its own.
    """

    slot: Tensor
    token_index: Tensor
    document: Tensor

    @classmethod
    def of(cls, coords: Coords, slot: Tensor, token_index: Tensor) -> "PositionInExpertMetadata":
        return cls(slot, token_index, coords.document + 1)


class PositionInExpert(Mixer):
    """Count the tokens before each one, in its document, that have chosen the same expert."""

    def __init__(self) -> None:
        super().__init__()
        self.set_metadata_key()

    def forward(self, expert: Tensor, attn_metadata: BatchMetadata) -> Tensor:
        """expert [B, L], the number of the one that a token chooses -> [B, L]."""
        metadata: PositionInExpertMetadata = self.own(attn_metadata)
        chosen = self.of_all(expert.to(torch.int32))[:, metadata.slot].long()
        # Documents and their experts one after the other, tokens of each in their order.
        key = metadata.document * (chosen.max() + 1) + chosen
        key, order = key.sort(dim=1, stable=True)
        index = torch.arange(key.shape[1], device=key.device).expand_as(key)
        place = index - torch.searchsorted(key, key)
        of_token = torch.empty_like(place).scatter(1, order, place)
        return of_token[:, metadata.token_index]

    def of_all(self, expert: Tensor) -> Tensor:
        """The choices of the tokens of all ranks: [B, S]."""
        return expert

    def forward_without_mixing(self, *args: Any, **kwargs: Any) -> Tensor:
        return torch.zeros_like(args[0])

    def whole_row_metadata(self, coords: Coords) -> AttentionMetadata:
        index = torch.arange(coords.document.shape[1])
        return PositionInExpertMetadata.of(coords, index, index)


class ContextParallelPositionInExpert(ClaimedMixer, PositionInExpert):
    """A PositionInExpert that a style has taken over."""

    carry_out = PositionInExpert.forward

    def of_all(self, expert: Tensor) -> Tensor:
        return all_gather(expert, self.axis, dim=1)


@dataclass
class PositionInExpertCP(MixerStyle):
    """Positions in experts of tokens that lie on several ranks, in any layout.

    Traffic per rank: (n - 1) * B * L numbers of 4 bytes.
    """

    claims: ClassVar[Mapping[type[Mixer], type[ClaimedMixer]]] = {
        PositionInExpert: ContextParallelPositionInExpert
    }
    layouts: ClassVar[tuple[type[SequenceLayout], ...]] = (SequenceLayout,)

    def make_metadata(
        self, mixer: Mixer, coords: Coords, layout: SequenceLayout, rank: int
    ) -> AttentionMetadata:
        self.check(mixer, layout)
        return PositionInExpertMetadata.of(coords, layout.inverse(), layout.token_indices(rank))


def surveyed_capacity(model: nn.Module) -> tuple[SurveyedMixer, ...]:
    """The mixers of a model's routers."""
    named = model.named_modules()
    routers = [name for name, module in named if type(module).__name__ in ROUTERS]
    return tuple(SurveyedMixer(f"{name}.{MIXER}", PositionInExpert, ()) for name in routers)


def unread_capacity(model: nn.Module) -> Iterator[str]:
    """Why routers that implement a capacity in another way are refused, in sentences."""
    for name, module in model.named_modules():
        kind = type(module).__name__
        if hasattr(module, CAPACITY) and kind not in ROUTERS:
            yield (
                f"{name} ({kind}): experts take {CAPACITY}={getattr(module, CAPACITY)} tokens of a "
                f"batch, those of all ranks among them, and by an order of its own: write it with "
                f"a mixer (docs/add_a_model.md)."
            )


@contextmanager
def unlimited_capacity(model: nn.Module) -> Iterator[None]:
    """Inside, experts have no capacity, so that no token depends on another one's choice."""
    routers: list[Any] = [m for m in model.modules() if type(m).__name__ in ROUTERS]
    routers = [router for router in routers if "forward" not in vars(router)]
    for router in routers:
        router.forward = MethodType(_without_capacity, router)
        router.classifier.forward = MethodType(_in_given_dtype, router.classifier)
    try:
        yield
    finally:
        for router in routers:
            del router.forward, router.classifier.forward


def install_capacity(model: nn.Module) -> None:
    """Let routers count by a mixer, and every expert compute, if only on no token.

    A block hands its router the batch of its call; a rank whose tokens have chosen no expert has a
    gradient for it like others.
    """
    blocks: dict[str, list[Any]] = {}
    for name, module in model.named_modules():
        if type(module).__name__ in EXPERTS:
            wrap_forward(module, _all_experts)
        if type(module).__name__ not in ROUTERS:
            continue
        module.add_module(MIXER, PositionInExpert())
        wrap_forward(module, _first_tokens)
        wrap_forward(module.get_submodule("classifier"), _cast_to_input)
        parts = name.split(".")
        number = next(index for index, part in enumerate(parts) if part.isdigit())
        blocks.setdefault(".".join(parts[: number + 1]), []).append(module)
    for name, routers in blocks.items():
        block = model.get_submodule(name)
        vars(block)[_ROUTERS] = tuple(routers)
        wrap_forward(block, _hand_batch)


ROUTERS, EXPERTS = ("SwitchTransformersTop1Router",), ("SwitchTransformersExperts",)
"""By the names of their classes."""

_ROUTERS, _BATCH = "dtcp_routers", "dtcp_batch_of_block"


def _hand_batch(block: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    for router in getattr(block, _ROUTERS):
        setattr(router, _BATCH, kwargs["attn_metadata"])
    return forward(*args, **kwargs)


def _first_tokens(router: Any, _: Any, hidden_states: Tensor) -> Any:
    """The router's outputs, in which tokens past the capacity choose no expert."""
    expert, probability, logits = _choice(router, hidden_states)
    place = router.get_submodule(MIXER)(expert, getattr(router, _BATCH))
    chosen = F.one_hot(expert, router.num_experts)
    return chosen * (place < router.expert_capacity)[..., None], probability, logits


def _without_capacity(router: Any, hidden_states: Tensor) -> Any:
    expert, probability, logits = _choice(router, hidden_states)
    return F.one_hot(expert, router.num_experts), probability, logits


def _choice(router: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As SwitchTransformersTop1Router, which casts its weights for good, even FSDP's."""
    logits = router.classifier(hidden_states.to(router.dtype))
    probability = logits.softmax(-1, dtype=router.dtype).to(hidden_states.dtype)
    highest, expert = probability.max(-1)
    return expert, highest[..., None], logits


def _in_given_dtype(linear: Any, x: Tensor) -> Tensor:
    bias = None if linear.bias is None else linear.bias.to(x.dtype)
    return F.linear(x, linear.weight.to(x.dtype), bias)


def _cast_to_input(linear: Any, _: Any, x: Tensor) -> Tensor:
    return _in_given_dtype(linear, x)


def _all_experts(
    experts: Any, _: Any, hidden_states: Tensor, selected_experts: Tensor, weights: Tensor
) -> Tensor:
    """hidden_states [T, D], selected_experts [T, 1, E], weights [T, 1] -> [T, D]."""
    out = torch.zeros_like(hidden_states)
    for index, expert in enumerate(experts.values()):
        token = selected_experts[:, 0, index].nonzero()[:, 0]
        out = out.index_add(0, token, expert(hidden_states[token]) * weights[token])
    return out
