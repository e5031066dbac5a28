"""What the DTensor rules of our ops share: what they accept, and the way to local tensors and back.

Our ops take DTensors whose sequence is sharded on exactly the axis the op communicates over;
heads and batch may be sharded on other axes. Any other placement raises: a rule that torch
applied to every axis alike would accept a sequence sharded over tp, and be silently wrong.

Example::
    def forward_rule(op, args, kwargs):
        call = bind(op, args, kwargs)
        check_placements(str(op), (call["q"], call["k"], call["v"]), call["groups"][0])
        out, saved = op(**to_local(call))
        return wrap(out, call["q"]), saved

    set_dtensor_rule(forward, forward_rule)
"""

from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Any, TypeVar, cast

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from dtcp._torch.dtensor import local_tensor
from dtcp._torch.ops import OpOverload, argument_names
from dtcp._torch.tensors import base_of, changes_of, weak_storage
from dtcp.distributed.groups import axis_group_name

SEQ, HEADS = 1, 2  # dims of [B, L, H, D], and of lse [B, L, H]

Tree = TypeVar("Tree")


def bind(op: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by the names of the op's schema, in its order, defaults left out."""
    return {**dict(zip(argument_names(op), args, strict=False)), **kwargs}


def to_local(tree: Tree) -> Tree:
    """The same arguments or results with every DTensor replaced by its shard."""
    local: Any = tree
    if isinstance(tree, DTensor):
        local = local_tensor(tree)
    elif isinstance(tree, dict):
        local = {name: to_local(value) for name, value in tree.items()}
    elif isinstance(tree, (list, tuple)):
        local = [to_local(value) for value in tree]
        local = tuple(local) if isinstance(tree, tuple) else local
    return local


def wrap(local: Tensor, like: DTensor) -> DTensor:
    """A shard as a DTensor on the mesh of another, placed as it is."""
    return DTensor.from_local(local, like.device_mesh, like.placements, run_check=False)


def num_shards(x: DTensor, dim: int) -> int:
    """How many parts a dim is cut into."""
    sizes = (x.device_mesh.size(i) for i, p in enumerate(x.placements) if p == Shard(dim))
    return prod(sizes)


def check_placements(name: str, tensors: Sequence[Tensor], axis: str) -> None:
    """Refuse inputs unless the sequence, and nothing else of it, is sharded on the axis.

    Args:
        axis: name of the process group the op communicates over.
    """
    placed = [(x.device_mesh, x.placements) if isinstance(x, DTensor) else None for x in tensors]
    if placed[0] is None or any(each != placed[0] for each in placed):
        raise ValueError(
            f"{name} takes q, k, v and all else that is of tokens sharded alike, got (mesh, "
            f"placements)={placed}, None for a plain tensor: redistribute them to one placement."
        )
    mesh, placements = placed[0]
    for index, placement in enumerate(placements):
        here = axis_group_name(mesh, index) == axis
        allowed: tuple[Placement, ...] = (Shard(SEQ),) if here else _ELSEWHERE
        if placement not in allowed:
            raise ValueError(
                f"{name} communicates over one mesh axis, on which the sequence is sharded, got "
                f"placement={placement} on axis {index} of {mesh}: place it as one of {allowed}."
            )
        if isinstance(placement, Shard):
            _check_equal_shards(name, tensors, placement.dim, mesh, index)
    if Shard(SEQ) not in placements:
        raise ValueError(
            f"{name} communicates over an axis of its inputs' mesh, got inputs on {mesh}, which "
            f"lacks it: use the mesh the plan was applied on."
        )


def _check_equal_shards(
    name: str, tensors: Sequence[Tensor], dim: int, mesh: DeviceMesh, index: int
) -> None:
    """Refuse a dim that an axis cuts unevenly: on all ranks, where one alone would find less."""
    sizes = [x.shape[dim] for x in tensors]
    if any(size % mesh.size(index) for size in sizes):
        raise ValueError(
            f"{name} computes on shards of one size, got {sizes} in dim {dim} on axis {index} of "
            f"{mesh}: pad it to a multiple of {mesh.size(index)}."
        )


Writes = tuple[Any, int]
"""Where the shard of a DTensor lies, and how often it has been written to."""


def writes_to(x: Tensor) -> Writes | None:
    """Of what an op keeps for backward, to be compared then; None for what autograd looks at.

    A DTensor counts what is written to itself, and not to the tensor it was made of; nor does it in
    a graph, whose backward would read what was written after.
    """
    # Below autograd a view of a shard has a count of its own.
    local = local_tensor(cast(DTensor, base_of(x))) if isinstance(x, DTensor) else None
    if local is None or local.is_inference():
        return None
    # Kept, it is no other memory's name: one that hooks of saved tensors gave instead.
    return weak_storage(local), changes_of(local)


def check_unwritten(op: str, kept: Iterable[tuple[str, Tensor, Writes | None]]) -> None:
    """Refuse what has been written to since forward: of plain tensors autograd does.

    Args:
        kept: by name, and what `writes_to` said of it then.
    """
    for name, x, before in kept:
        now = writes_to(x)
        if before is not None and now is not None and now[0] == before[0] and now != before:
            raise RuntimeError(
                f"one of the variables needed for gradient computation has been modified by an "
                f"inplace operation: {name} of {op} is at version {now[1]}, expected "
                f"{before[1]}: write to a copy, or after backward."
            )


_ELSEWHERE = (Replicate(), Shard(0), Shard(HEADS))
