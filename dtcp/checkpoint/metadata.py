"""`.metadata` of a distributed checkpoint, parsed as data.

The file is a pickle, a program that names the functions it calls. This reader knows the names that
torch writes there and no other, and gives the program empty stand-ins for them, made anew for each
file: whatever it builds is a tree of plain values. From it torch's own classes are made here, each
field after a look at its type.
"""

import io
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from dtcp._torch.checkpoint import StorageInfo

NAME = ".metadata"

METADATA_MODULE = "torch.distributed.checkpoint.metadata"
CLASSES: Mapping[tuple[str, str], str] = {
    **{
        (METADATA_MODULE, name): name
        for name in (
            "Metadata",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "MetadataIndex",
            "StorageMeta",
        )
    },
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): "StorageInfo",
}
"""Dataclasses of torch (2.11-2.15) by module and name, and what they are called here."""

PATHS = (
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib._local", "PosixPath"),
    ("pathlib._local", "WindowsPath"),
)

# What the standard library's unpickler raises where a file is not a pickle, or not a whole one.
UNREADABLE = (
    pickle.UnpicklingError,
    EOFError,
    ArithmeticError,
    LookupError,
    AttributeError,
    TypeError,
    ValueError,
    MemoryError,
)


def read_metadata(folder: Path) -> Metadata:
    """Parse the metadata of a checkpoint's folder.

    Raises:
        ValueError: it names code, or is not what torch writes; nothing of it was run.
        OSError: it cannot be read.
    """
    path = folder / NAME
    return parse_metadata(path.read_bytes(), path)


def parse_metadata(data: bytes, path: Path) -> Metadata:
    """Parse metadata; `path` is where they come from, for messages.

    Raises:
        ValueError: as for `read_metadata`.
    """
    parser = _Parser(data)
    try:
        return _metadata(parser.load(), parser.classes)
    except NamesCode as error:
        raise _holds_code(path, error) from error
    except UNREADABLE as error:
        raise ValueError(f"{path} is cut short or damaged ({error or type(error).__name__})") from (
            error
        )


class NamesCode(pickle.UnpicklingError):
    """A pickle names something that is not on the list."""


class DataUnpickler(pickle.Unpickler):
    """Reads pickles of plain values: numbers, text, bytes, lists, tuples, dicts, sets, None."""

    def find_class(self, module: str, name: str) -> Any:
        raise NamesCode(f"{module}.{name}")


class _StandIn:
    """What stands for an object of torch: the state that the pickle gives it."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Parser(DataUnpickler):
    """Reads the pickle into stand-ins.

    Made anew for each file: a pickle can set attributes of whatever it is given.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self.classes = {name: type(name, (_StandIn,), {}) for name in CLASSES.values()}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in CLASSES:
            return self.classes[CLASSES[module, name]]
        if (module, name) == ("torch", "Size"):
            return tuple
        if (module, name) == (METADATA_MODULE, "_MEM_FORMAT_ENCODING"):
            return int
        if (module, name) == ("torch.serialization", "_get_layout"):
            return str
        if (module, name) in PATHS:
            return lambda *parts: "/".join(map(str, parts))
        value = vars(torch).get(name) if module == "torch" else None
        if isinstance(value, torch.dtype):
            return value
        return super().find_class(module, name)


Classes = Mapping[str, type[_StandIn]]


def _metadata(value: Any, classes: Classes) -> Metadata:
    state = _state(value, classes["Metadata"])
    entries = _typed(state["state_dict_metadata"], dict)
    storage = _typed(state["storage_data"], dict)
    planner = _typed(state.get("planner_data") or {}, dict)
    return Metadata(
        state_dict_metadata={_typed(k, str): _storage(v, classes) for k, v in entries.items()},
        planner_data={_typed(k, str): _object_path(v) for k, v in planner.items()},
        storage_data={_index(k, classes): _info(v, classes) for k, v in storage.items()},
        storage_meta=_storage_meta(state.get("storage_meta"), classes),
        version=_typed(state.get("version") or "", str) or None,
    )


def _storage(value: Any, classes: Classes) -> TensorStorageMetadata | BytesStorageMetadata:
    if isinstance(value, classes["BytesStorageMetadata"]):
        return BytesStorageMetadata()
    state = _state(value, classes["TensorStorageMetadata"])
    return TensorStorageMetadata(
        properties=_properties(state["properties"], classes),
        size=_size(state["size"]),
        chunks=[_chunk(chunk, classes) for chunk in _typed(state["chunks"], list)],
    )


def _chunk(value: Any, classes: Classes) -> ChunkStorageMetadata:
    state = _state(value, classes["ChunkStorageMetadata"])
    return ChunkStorageMetadata(offsets=_size(state["offsets"]), sizes=_size(state["sizes"]))


def _properties(value: Any, classes: Classes) -> TensorProperties:
    """Only the dtype is read by torch; the other fields are those of any dense tensor.

    But for strides, which torch 2.15 adds.
    """
    fields = _typed(_typed(value, classes["TensorProperties"]).state, tuple)
    added: dict[str, Any] = {}
    if len(fields) > 5 and fields[5] is not None and hasattr(TensorProperties, "strides"):
        added["strides"] = tuple(_typed(stride, int) for stride in _typed(fields[5], tuple))
    return TensorProperties(dtype=_typed(fields[0], torch.dtype), **added)


def _index(value: Any, classes: Classes) -> MetadataIndex:
    state = _state(value, classes["MetadataIndex"])
    offset, index = state.get("offset"), state.get("index")
    return MetadataIndex(
        _typed(state["fqn"], str),
        None if offset is None else _size(offset),
        None if index is None else _typed(index, int),
    )


def _info(value: Any, classes: Classes) -> Any:
    state = _state(value, classes["StorageInfo"])
    if state.get("transform_descriptors"):
        raise ValueError("it holds compressed entries, which torch writes only if asked to")
    offset, length = _typed(state["offset"], int), _typed(state["length"], int)
    if offset < 0 or length < 0:
        raise ValueError(f"an entry starts at {offset} and is {length} bytes long")
    return StorageInfo(_typed(state["relative_path"], str), offset, length)


def _storage_meta(value: Any, classes: Classes) -> StorageMeta:
    if value is None:
        return StorageMeta()
    return StorageMeta(save_id=str(_state(value, classes["StorageMeta"]).get("save_id")))


def _object_path(value: Any) -> tuple[str | int, ...]:
    if not all(type(key) in (str, int) for key in _typed(value, tuple)):
        raise TypeError(f"an entry's place is names and numbers, got {value!r:.80}")
    return tuple(value)


def _size(value: Any) -> torch.Size:
    if not all(type(n) is int and n >= 0 for n in _typed(value, tuple)):
        raise TypeError(f"a size is whole numbers, got {value!r:.80}")
    return torch.Size(value)


def _state(value: Any, of: type[_StandIn]) -> dict[str, Any]:
    # A class without fields has no state.
    return dict(_typed(_typed(value, of).state or {}, dict))


def _typed(value: Any, kind: type[Any]) -> Any:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise TypeError(f"a {kind.__name__} is expected where it has a {type(value).__name__}")
    return value


def nested_pickles(value: Any) -> Iterator[bytes]:
    """Bytes inside a value of plain containers: what a stateful object may unpickle itself."""
    if isinstance(value, bytes | bytearray):
        yield bytes(value)
    elif isinstance(value, dict):
        for pair in value.items():
            yield from nested_pickles(pair)
    elif isinstance(value, list | tuple | set | frozenset):
        for item in value:
            yield from nested_pickles(item)


def refuse_code(data: bytes, subject: str) -> None:
    """Refuse bytes that would run code if somebody unpickled them.

    Bytes that are no pickle are nobody's program, and pass.

    Raises:
        ValueError: naming the subject and what its pickle names.
    """
    try:
        DataUnpickler(io.BytesIO(data)).load()
    except NamesCode as error:
        raise _holds_code(subject, error) from error
    except UNREADABLE:
        return


def _holds_code(subject: str | Path, error: NamesCode) -> ValueError:
    return ValueError(
        f"A checkpoint holds data and no code, got {subject}, which names {error}: nothing of it "
        f"was run; do not use this folder unless you know where it comes from."
    )
