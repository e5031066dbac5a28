"""Loads Hugging Face weights into a model: all of its tensors, no others, all finite."""

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.distributed import checkpoint as dcp
from torch.distributed.device_mesh import DeviceMesh

from dtcp.checkpoint import SafeHuggingFaceReader
from dtcp.checkpoint.huggingface import weight_files
from dtcp.pretrain.finite import not_finite
from dtcp.pretrain.staged import of_all_stages

StateDict = dict[str, Any]
HEAD, EMBEDDING = "lm_head.weight", "embed_tokens.weight"


def read_hf_weights(
    adapter: Any,
    state: StateDict,
    path: Path,
    *,
    ignore: Sequence[str],
    pp: DeviceMesh | None = None,
) -> StateDict:
    """A model's state dict, filled from a folder of safetensors.

    Args:
        adapter: torchtitan's, with `to_hf` and `from_hf`.
        state: the model's tensors by its own names; they are written in place where they can be.
        ignore: patterns of tensors in the folder that the model does without.
        pp: whose ranks have the tensors of other stages.
    Raises:
        ValueError: a tensor is missing, of another shape, left over, or not finite; by its name.
    """
    reader, wanted = SafeHuggingFaceReader(path), adapter.to_hf(state)
    of_all = of_all_stages({name: x.shape for name, x in wanted.items()}, pp)
    _compare(reader.shapes(), of_all, path, adapter=adapter, ignore=ignore)
    dcp.load(wanted, storage_reader=reader)
    refuse_not_finite_weights(wanted, path)
    loaded: StateDict = adapter.from_hf(wanted)
    return loaded


def refuse_not_finite_weights(state: Mapping[str, Any], path: Path) -> None:
    """Refuse weights that are not finite, which the first save, hours later, would find.

    Raises:
        ValueError: naming the first such tensor. On every rank alike.
    """
    bad = not_finite(state)
    if bad:
        raise ValueError(
            f"Weights are finite, got NaN or infinity in {bad[0]}{_more(bad)} of {path}: convert "
            f"them again, or start from others."
        )


def _compare(
    shapes: Mapping[str, torch.Size],
    wanted: Mapping[str, torch.Size],
    path: Path,
    *,
    adapter: Any,
    ignore: Sequence[str],
) -> None:
    missing = sorted(wanted.keys() - shapes.keys())
    if missing:
        raise ValueError(
            f"A folder has every weight of the model, got {path} without {missing[0]}"
            f"{_more(missing)}: take weights of this config, or the config of these weights."
        )
    other = [name for name, shape in wanted.items() if shapes[name] != shape]
    if other:
        raise ValueError(
            f"A weight has the shape of its parameter, got {other[0]} of "
            f"{list(shapes[other[0]])} for {list(wanted[other[0]])}{_more(other)} in {path}: "
            f"take weights of this config, or the config of these weights."
        )
    extra = [
        name
        for name in sorted(shapes.keys() - wanted.keys())
        if not any(fnmatch(name, pattern) for pattern in ignore)
        and not _is_left_out(adapter.from_hf, name, shapes[name])
        and not _repeats_embedding(path, name, shapes)
    ]
    if extra:
        raise ValueError(
            f"A model takes every weight of a folder, got {extra[0]}{_more(extra)} in {path}, for "
            f"which it has no place: take the config of these weights, or leave them out on "
            f"purpose with --checkpoint.hf_ignore {extra[0]}."
        )


def _is_left_out(from_hf: Callable[[StateDict], StateDict], name: str, shape: torch.Size) -> bool:
    """Whether the family knows the name and drops it, as it drops a vision tower."""
    try:
        return not from_hf({name: torch.empty(shape, device="meta")})
    except (ValueError, LookupError, AttributeError):
        return False


def _repeats_embedding(path: Path, name: str, shapes: Mapping[str, torch.Size]) -> bool:
    """Whether this is a tied head, a copy of the embedding."""
    twins = [other for other in shapes if other.endswith(EMBEDDING)]
    if name != HEAD or len(twins) != 1 or shapes[twins[0]] != shapes[name]:
        return False
    head, embedding = (_slices(path, wanted) for wanted in (name, twins[0]))
    rows = range(0, shapes[name][0], 4096)
    return all(torch.equal(head[r : r + 4096], embedding[r : r + 4096]) for r in rows)


def _slices(path: Path, name: str) -> Any:
    for file in weight_files(path):
        opened = safe_open(file, framework="pt")
        if name in opened.keys():  # noqa: SIM118
            return opened.get_slice(name)
    raise KeyError(name)


def _more(names: Sequence[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
