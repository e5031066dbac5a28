"""What the mixers of a model read of a batch: made once for each kind of mixer, on the host."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from operator import methodcaller
from typing import Any, NamedTuple, Self, TypeVar

import torch
from torch import Tensor, nn

from dtcp._torch.modules import children_of
from dtcp.metadata import BatchMetadata, MetadataKey
from dtcp.mixer import Mixer
from dtcp.sequence.arguments import check_kind
from dtcp.sequence.coords import Coords
from dtcp.sequence.documents import Documents
from dtcp.sequence.host import on_host
from dtcp.sequence.layout import SequenceLayout
from dtcp.sequence.memory import Memory
from dtcp.token_dropout import TokenDropout, any_drops, drawn_seed, numbered, token_keys

T = TypeVar("T")
ROW_CHECK = "dtcp_row_check"
"""What a module has that refuses rows which no shard would show it: a function of `Rows`."""


def collect_metadata(
    model: nn.Module,
    coords: Coords,
    layout: SequenceLayout | None = None,
    *,
    real: Tensor | None = None,
    last_position: int | None = None,
) -> BatchMetadata:
    """What the mixers of a model read of a batch: once per kind of mixer, on the host.

    Args:
        real: [B, L] bool, this rank's tokens that are no padding.
        last_position: the largest of all ranks' position ids.
    """
    return MixerKinds.of(model).metadata(coords, layout, real=real, last_position=last_position)


@on_host
def batch_metadata(
    model: nn.Module,
    documents: Documents,
    *,
    prefix: Tensor | None = None,
    block: Tensor | None = None,
    position_ids: Tensor | None = None,
    memory: Documents | None = None,
) -> BatchMetadata:
    """The metadata of a batch of whole rows, for a model on one device.

    Args:
        prefix, block: [B, S], what masks read of prefixes and blocks.
        position_ids: [B, S], what the model is called with; None where they count a document's
            tokens.
        memory: documents of the sequence that cross attention reads.
    """
    other = None if memory is None else Memory(memory)
    coords = Coords.of(
        documents, prefix=prefix, block=block, position_ids=position_ids, memory=other
    )
    counted = documents.position_ids() if position_ids is None else position_ids
    real, last = coords.document >= 0, int(counted.max())
    metadata = collect_metadata(model, coords, real=real, last_position=last)
    seed = drawn_seed(drops=any_drops(MixerKinds.of(model).dropouts))
    if seed is None:
        return metadata
    rows, tokens = torch.arange(coords.rows), torch.arange(coords.seq_len)
    return metadata.with_token_keys(token_keys(seed, rows, tokens))


def mixers_of(model: nn.Module) -> tuple[Mixer, ...]:
    """All mixers of a model, each once."""
    return tuple(mixer for mixer, _ in MixerKinds.of(model).mixers)


class MixerKinds(NamedTuple):
    """The first mixer of each kind in a model, and what tells that they still are.

    Args:
        row_checks: of its modules, each called with the whole rows that are cut for the model.
        dropouts: those of its modules that drop by token, which read a batch as well.
    """

    first: tuple[Mixer, ...]
    mixers: tuple[tuple[Mixer, MetadataKey], ...]
    inside: tuple[Mapping[str, nn.Module | None], ...]
    children: list[nn.Module | None]
    counts: list[int]
    made: dict[Callable[..., Any], Any]
    row_checks: tuple[Callable[[Any], None], ...] = ()
    dropouts: tuple[TokenDropout, ...] = ()

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        """Remembered by the model while its modules have the same children and mixers their keys.

        To look at all modules of a large model takes as long as the metadata of a mask.
        """
        check_kind("Metadata", nn.Module, model=model)
        known = vars(model).get(_FOUND)
        if known is None or not known.hold(model):
            modules = list(model.modules())
            mixers = tuple((x, x.metadata_key) for x in modules if isinstance(x, Mixer))
            first = {key: mixer for mixer, key in reversed(mixers)}
            order = dict.fromkeys(key for _, key in mixers)
            children = [children_of(module) for module in modules]
            # The model's own first, whether it has any or not; leaves get none later on.
            inside = tuple(x for x in children if x or x is children[0])
            kinds = tuple(first[key] for key in order)
            checks = tuple(vars(x)[ROW_CHECK] for x in modules if ROW_CHECK in vars(x))
            own, dropouts = [*map(len, inside)], numbered(model)
            known = cls(kinds, mixers, inside, _values(inside), own, {}, checks, dropouts)
            vars(model)[_FOUND] = known
        return known

    def metadata(
        self,
        coords: Coords,
        layout: SequenceLayout | None = None,
        *,
        real: Tensor | None = None,
        last_position: int | None = None,
    ) -> BatchMetadata:
        """`collect_metadata` of the model."""
        by_key = {mixer.metadata_key: mixer.make_metadata(coords, layout) for mixer in self.first}
        return BatchMetadata(by_key, real, last_position=last_position)

    def remembered(self, make: Callable[[Sequence[Mixer]], T]) -> T:
        """What a function makes of all mixers: once, for it depends on their keys alone."""
        if make not in self.made:
            self.made[make] = make([mixer for mixer, _ in self.mixers])
        return self.made[make]

    def __reduce__(self) -> Any:
        """Neither copied nor saved with its model."""
        return type(None), ()

    def hold(self, model: nn.Module) -> bool:
        """Whether it is what a look at all modules would find."""
        return (
            self.inside[0] is children_of(model)
            and [*map(len, self.inside)] == self.counts
            and _values(self.inside) == self.children
            and all(mixer.metadata_key is key for mixer, key in self.mixers)
        )


def _values(modules: Iterable[Mapping[str, nn.Module | None]]) -> list[nn.Module | None]:
    """The children of all of them, in one list: a model has hundreds."""
    return [*chain.from_iterable(map(methodcaller("values"), modules))]


_FOUND = "kinds_of_mixers"
