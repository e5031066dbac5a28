"""What a batch tells the mixers: typed values, made once per batch on the host.

Each kind of mixer has a kind of metadata: a frozen dataclass of tensors. Kernels read some of them
on the device; the host reads the others (`HostTensor`) to know sizes, and those never leave it. A
batch's metadata are kept by value: mixers that read the same mask, carried out in the same way,
share one.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Annotated, Any, Self

import torch
from torch import Tensor

from dtcp.sequence.host import on_device

HostTensor = Annotated[Tensor, "read by the host"]
"""The type of a field that stays on the host when metadata move to a device."""


def no_indices() -> Tensor:
    """Of a field that kernels index by, where a batch needs none: [0] int32."""
    return torch.zeros(0, dtype=torch.int32)


def no_sizes() -> Tensor:
    """Of a field that the host reads, where a batch needs none: [0] int64."""
    return torch.zeros(0, dtype=torch.int64)


@dataclass(frozen=True, eq=False)
class AttentionMetadata:
    """What one kind of mixer reads of a batch on one rank. Subclasses are frozen dataclasses.

    Shapes are the same on every rank and for every batch of one length, so a graph stays valid.

    Args:
        in_line: whether the rows of the batch are read as one row, one after another.
    """

    in_line: bool = field(default=False, kw_only=True)

    def to(self, device: torch.device | str) -> Self:
        """The same metadata, with what kernels read on the device."""
        moved: dict[str, Any] = {
            each.name: on_device(value, device) if isinstance(value, Tensor) else value.to(device)
            for each in fields(self)
            if each.type not in (HostTensor, bool)
            and (value := getattr(self, each.name)) is not None
        }
        return replace(self, **moved)

    def tensors(self) -> list[Tensor]:
        """All fields in their order, as an op takes them; those of nested metadata in line."""
        tensors: list[Tensor] = []
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, Tensor):
                tensors.append(value)
            elif isinstance(value, AttentionMetadata):
                tensors.extend(value.tensors())
        return tensors

    @classmethod
    def of_tensors(cls, tensors: Sequence[Tensor]) -> Self:
        """The way back from `tensors`, field by field, for metadata that nest no others."""
        names = (each.name for each in fields(cls) if each.name != "in_line")
        named: dict[str, Any] = dict(zip(names, tensors, strict=True))
        return cls(**named)


@dataclass(frozen=True)
class NoMetadata(AttentionMetadata):
    """Of a mixer that reads nothing of a batch."""


@dataclass(frozen=True)
class MetadataKey:
    """Which mixers read the same metadata: those of equal keys.

    Args:
        value: all that the metadata depend on beside the batch.
        label: for people; not compared.
        kinds: the same on all ranks, where objects in `label` may differ; not compared.
    """

    value: tuple[Hashable, ...]
    label: str = field(compare=False)
    kinds: str = field(compare=False)

    def __str__(self) -> str:
        return self.label


def metadata_key(*parts: object, ranks: str = "") -> MetadataKey:
    """The key of a mixer that these parts identify: its type, its mask, its style.

    Args:
        ranks: that it exchanges with; none on one device. Rows that are cut for other ranks have
            other tokens in the same shapes.
    Raises:
        TypeError: a part whose value is not known (`value_of`).
    """
    names = (part.__name__ if isinstance(part, type) else str(part) for part in parts)
    label = ", ".join([*names, f"ranks {ranks}"] if ranks else names)
    value = tuple(value_of(part) for part in parts)
    return MetadataKey((*value, ranks), label, _kinds_of(value))


def _kinds_of(value: Hashable) -> str:
    """Names of classes, numbers and words; of other objects, their class."""
    if isinstance(value, tuple):
        return f"({' '.join(map(_kinds_of, value))})"
    if isinstance(value, type):
        return value.__qualname__
    return repr(value) if isinstance(value, int | float | str) else type(value).__qualname__


def value_of(part: object) -> Hashable:
    """A dataclass as a hashable value: its type and its compared fields, all the way down.

    Raises:
        TypeError: an object that holds more than its fields say, or a field without a hash. Two
            of them could be taken for one, and the second would read the first one's metadata.
    """
    if is_dataclass(part) and not isinstance(part, type):
        # torch's parallelize_module leaves src_data_rank on every style.
        hidden = vars(part).keys() - {each.name for each in fields(part)} - {"src_data_rank"}
        if hidden:
            raise TypeError(
                f"Masks and styles are identified by their fields, got {type(part).__name__} that "
                f"holds {sorted(hidden)} beside them: declare it as a dataclass (a mask frozen) "
                f"with these as fields."
            )
        compared = (each.name for each in fields(part) if each.compare)
        return (type(part), *(value_of(getattr(part, name)) for name in compared))
    if isinstance(part, tuple | list):
        return (type(part), *map(value_of, part))
    try:
        hash(part)
    except TypeError as error:
        raise TypeError(
            f"Masks and styles are identified by their fields, got one of "
            f"{type(part).__name__}, which has no hash: give a number, a tuple or a dataclass."
        ) from error
    # As text: a number would be a symbol of graphs whose sizes are, and those have no hash.
    return (type(part), repr(part)) if isinstance(part, int | float) else part


class BatchMetadata:
    """The metadata of a batch, by the key of the mixers that read them.

    No dict: FSDP moves all tensors in the dicts, tuples and dataclasses that its root module is
    called with to the device, and the host would wait for its own numbers.

    Args:
        real: [B, L] bool, this rank's tokens that are no padding; None where nobody says.
        memory: that of the sequence which an encoder reads, in a model that has one.
        last_position: the largest of all ranks' position ids; None where nobody says.
        token_keys: [B, L] int64, what tells each of this rank's tokens apart to a TokenDropout;
            None where the model has none that drops.
    """

    def __init__(
        self,
        by_key: Mapping[MetadataKey, AttentionMetadata],
        real: Tensor | None = None,
        memory: "BatchMetadata | None" = None,
        last_position: int | None = None,
        token_keys: Tensor | None = None,
    ) -> None:
        self.real = real
        self.memory = memory
        self.last_position = last_position
        self.token_keys = token_keys
        # Keys of their own: dynamo would guard that one is the very object that a mixer holds.
        self._by_key = {replace(key): value for key, value in by_key.items()}

    def to(self, device: torch.device | str) -> "BatchMetadata":
        """The same, with what kernels read on the device."""
        moved = {key: each.to(device) for key, each in self._by_key.items()}
        real = None if self.real is None else on_device(self.real, device)
        memory = None if self.memory is None else self.memory.to(device)
        keys = None if self.token_keys is None else on_device(self.token_keys, device)
        return BatchMetadata(moved, real, memory, self.last_position, keys)

    def with_memory(self, memory: "BatchMetadata") -> "BatchMetadata":
        """The same, and that of the sequence which an encoder reads."""
        return self._changed(memory=memory)

    def with_token_keys(self, token_keys: Tensor) -> "BatchMetadata":
        """The same, and what tells its tokens apart."""
        return self._changed(token_keys=token_keys)

    def replaced(self, key: MetadataKey, value: AttentionMetadata) -> "BatchMetadata":
        """The same, but for what mixers of one key read."""
        return self._changed(by_key={**self._by_key, key: value})

    def _changed(self, **change: Any) -> "BatchMetadata":
        same = {
            "by_key": self._by_key,
            "real": self.real,
            "memory": self.memory,
            "last_position": self.last_position,
            "token_keys": self.token_keys,
        }
        return BatchMetadata(**{**same, **change})

    def __getitem__(self, key: MetadataKey) -> AttentionMetadata:
        return self._by_key[key]

    def __contains__(self, key: object) -> bool:
        return key in self._by_key

    def __iter__(self) -> Iterator[MetadataKey]:
        return iter(self._by_key)

    def __len__(self) -> int:
        return len(self._by_key)

    def __repr__(self) -> str:
        return f"BatchMetadata({', '.join(str(key) for key in self._by_key)})"
