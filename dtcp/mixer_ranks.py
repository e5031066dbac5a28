"""Whether the mixers of a model exchange with the ranks that a batch is cut for.

A batch is cut by a rank's place on the axis of its mesh, and read by that on the axis of the plan.
Another axis of as many ranks, or process groups made anew under old names, differ in no shape.
"""

from collections.abc import Iterable
from functools import cache

from torch.distributed.device_mesh import DeviceMesh

from dtcp.distributed.groups import group_name, members_of
from dtcp.mixer import ClaimedMixer, Mixer


def check_ranks(mixers: Iterable[Mixer], axis: DeviceMesh | None) -> None:
    """Refuse mixers that exchange with other ranks than those of an axis.

    Args:
        axis: that a batch is cut for; None for whole rows.
    Raises:
        ValueError: a plan applied on another axis, or before process groups were made anew.
    """
    if axis is None:
        return
    # Layers share their groups.
    members, here = cache(members_of), members_of(group_name(axis))
    for mixer in mixers:
        if not isinstance(mixer, ClaimedMixer):
            continue
        now = [members(name) for name in mixer.groups]
        if now != mixer.members:
            raise ValueError(
                f"A mixer exchanges with the ranks that its plan was applied on, got process "
                f"groups made anew, {mixer.members} then and {now} now, of {mixer}: build the "
                f"mesh, the model and its plan after init_process_group."
            )
        if mixer.members[0] != here and mixer.num_shards == axis.size():
            raise ValueError(
                f"A batch is cut for the ranks that its mixers exchange with, got {here} for the "
                f"batch and {mixer.members[0]} for {mixer}: cut it on the mesh of the plan, whose "
                f"first axis is that of the sequence."
            )


def check_memory_ranks(memory: DeviceMesh | None, axis: DeviceMesh | None) -> None:
    """Refuse a memory that was cut for other ranks than those of the axis.

    Raises:
        ValueError: another axis of as many ranks.
    """
    if memory is None or axis is None or memory.size() != axis.size():
        return
    there, here = (members_of(group_name(each)) for each in (memory, axis))
    if there != here:
        raise ValueError(
            f"A batch and its memory are cut for the same ranks, got {there} for the memory and "
            f"{here} for the batch: cut both on one mesh."
        )
