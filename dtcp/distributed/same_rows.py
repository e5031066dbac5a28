"""Ranks that share a batch compare what they read of it, before anything else is exchanged.

Each rank of a cp and tp group reads the rows itself. Where one reads others, which a distributed
sampler makes easy, a loss comes out that belongs to no batch, or a collective never ends. So a few
numbers go around first, from the host; a rank that refused its batch says so there, and no other
waits for it.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.data import get_worker_info

from dtcp.distributed.groups import gather_flat
from dtcp.sequence.arguments import WHOLE_NUMBERS
from dtcp.sequence.documents import Documents
from dtcp.sequence.host import on_host

T = TypeVar("T")
Contents = tuple[Mapping[str, Tensor], Documents | None]
"""What is compared of a batch: its tensors, and the documents of its rows."""

ASPECTS = ("documents", "token ids", "labels, positions or other keys")
"""What is compared in each row, in the order of its three hashes."""
IDS = ("input_ids", "inputs_embeds")
MIXERS = 5
"""Where a rank says what mixes its rows, among the numbers that go around."""
STRETCH = 1024
"""Entries of a row that are weighed together: their weights stay in a core's innermost cache."""


@dataclass(frozen=True, eq=False)
class RowHashes:
    """What is compared of a batch, worked out: in a thread ahead of its use, maybe.

    Args:
        of_rows: [B, 3], by ASPECTS.
        seq_len: tokens of a row.
        keys: a number that changes with their names.
        use: a number that changes with how the rows are cut.
        mixers: a number that changes with what mixes them; stages have others than each other.
    """

    of_rows: Tensor
    seq_len: int
    keys: int
    use: int
    mixers: int

    @classmethod
    def of(
        cls,
        tensors: Mapping[str, Tensor],
        documents: Documents | None,
        *,
        use: str = "",
        mixers: str = "",
    ) -> "RowHashes":
        """Of `Contents`.

        Args:
            use: how rows are cut.
            mixers: by what they are mixed.
        """
        hashes, seq_len = _hashes(tensors, documents)
        keys = zlib.crc32(" ".join(sorted(tensors)).encode())
        return cls(hashes, seq_len, keys, zlib.crc32(use.encode()), zlib.crc32(mixers.encode()))


@on_host
def prepared_alike(
    axes: Sequence[DeviceMesh | None],
    prepare: Callable[[], T],
    contents: Callable[[T], Contents | RowHashes],
    *,
    stages: DeviceMesh | None = None,
) -> T:
    """Prepare a batch, and refuse it on every rank if one rank has another or refused its own.

    Traffic per rank: 9 numbers from each rank of the axes, in one all_gather per axis; if they
    differ, 3 for each row as well. Cost: 0.2 ms for the hashes of four keys of 128K tokens on one
    CPU core, and the exchange (benchmarks/batch_checks.py). A group with a backend for the host
    (gloo) exchanges there; one of NCCL alone on the device, and then the host waits for what the
    device has in hand.

    Args:
        axes: whose ranks read the same rows; None for an axis of one rank. What is no DeviceMesh
            has no ranks to ask.
        prepare: what may refuse the batch on this rank.
        contents: what is compared of the result, or its hashes.
        stages: an axis whose ranks read the same rows, too, by mixers of their own.
    Raises:
        ValueError: ranks that differ, named with row; the same sentence on every rank.
    """
    given = (*axes, stages)
    wide = [axis for axis in given if isinstance(axis, DeviceMesh) and axis.size() > 1]
    if not wide:
        return prepare()
    hashes = torch.zeros(0, len(ASPECTS), dtype=torch.int64)
    head, error, result = [0, 0, 0, 0, 0, 0], None, None
    try:
        result = prepare()
        row_hashes = contents(result)
        row_hashes = row_hashes if isinstance(row_hashes, RowHashes) else RowHashes.of(*row_hashes)
        hashes = row_hashes.of_rows
        read = (row_hashes.keys, row_hashes.use, row_hashes.mixers)
        head = [1, len(hashes), row_hashes.seq_len, *read]
    except Exception as raised:  # noqa: BLE001
        # Held back, never swallowed: it is raised below. A rank that left without a word, for
        # whatever error, would leave the others waiting in the exchange. No BaseException: who
        # presses Ctrl-C waits for nobody.
        error = raised
    whole = _weights(len(hashes), hashes.device) @ hashes
    gathered = numbers_of_ranks(torch.cat((torch.tensor(head), whole)), wide)
    gathered[:, MIXERS] = _other_mixers(gathered, 1 if stages is None else stages.size())
    alike = gathered == gathered[0]
    differ = not bool(alike.all())
    rows_agree = int(gathered[0, 0]) == 1 and bool(alike[:, :2].all())
    every_row = numbers_of_ranks(hashes, wide) if differ and rows_agree else None
    if error is not None:
        raise error
    if differ:
        raise ValueError(_sentence(gathered, every_row, wide))
    return result  # type: ignore[return-value]


def compared_keys(batch: Mapping[str, Any]) -> Contents:
    """What is compared of a batch whose documents stand in tensors."""
    return {key: x for key, x in batch.items() if isinstance(x, Tensor) and x.numel()}, None


def digests(rows: Sequence[Tensor]) -> Tensor:
    """A number for each row that changes with what it holds: [B, 1]; rows of whole numbers."""
    out = torch.zeros(len(rows), 1, dtype=torch.int64)
    for number, row in zip(out, rows, strict=True):
        if row.numel():
            number.copy_(_sums(_numbers(row[None])))
    return out


def numbers_of_ranks(x: Tensor, axes: Sequence[DeviceMesh]) -> Tensor:
    """x of every rank of the axes: [ranks, ...], on the host; the first axis is the fastest.

    Raises:
        ValueError: in a worker of a DataLoader. Forked, it has the groups of its rank and none of
            the threads that answer for them: it would wait for ever.
    """
    worker = get_worker_info()
    if worker is not None:
        raise ValueError(
            f"Ranks compare their batches in the processes that are ranks, got one in worker "
            f"{worker.id} of a DataLoader: let workers collate whole rows, and shard what the "
            f"loader gives."
        )
    x = x[None]
    for axis in axes:
        group = axis.get_group()
        on_host = "cpu:" in str(dist.get_backend_config(group))
        local = x.contiguous().to("cpu" if on_host else axis.device_type)
        # One tensor: to make one for each of many ranks takes longer than all else here.
        parts = local.new_empty(axis.size() * len(local), *local.shape[1:])
        gather_flat(parts, local, group=group)
        x = parts.cpu()
    return x


def _hashes(tensors: Mapping[str, Tensor], documents: Documents | None) -> tuple[Tensor, int]:
    """Three hashes of every row, [B, 3], and the tokens of a row."""
    ids = next(key for key in IDS if key in tensors)
    rows, seq_len = tensors[ids].shape[:2]
    hashes = np.zeros((rows, len(ASPECTS)), dtype=np.int64)
    if documents is not None:
        hashes[:, 0] = [hash(row) for row in documents.lengths]
    for key, x in tensors.items():
        numbers = _numbers(x)
        hashed = _sums(numbers.reshape(rows if len(numbers) == rows else 1, -1))
        hashes[:, 1 if key == ids else 2] += hashed.cpu().numpy() * _odd(key)
    return torch.from_numpy(hashes), seq_len


def _sums(numbers: Tensor) -> Tensor:
    """A hash of each row, [B, N] to [B]: a sum with an odd weight for each place.

    A place has the weight of its stretch times that in its stretch: fewer weights to read.
    """
    rows, length = numbers.shape
    stretches, rest = divmod(length, STRETCH)
    weights = _weights(STRETCH + stretches + 1, numbers.device)
    sums = torch.zeros(rows, dtype=torch.int64, device=numbers.device)
    if rest:
        sums += numbers[:, length - rest :].long() @ weights[:rest] * weights[-1]
    if stretches:
        whole = numbers[:, : length - rest].reshape(-1, STRETCH)
        sums += _weighed(whole, weights[:STRETCH]).view(rows, -1) @ weights[STRETCH:-1]
    return sums


def _weighed(stretches: Tensor, weights: Tensor) -> Tensor:
    """Sums of weighed entries, [N, STRETCH] to [N], int64."""
    if stretches.device.type != "cpu":
        return stretches.long() @ weights
    # In two thirds of the time that torch takes for whole numbers, and narrow ones as they are.
    return torch.from_numpy(np.einsum("ns,s->n", stretches.numpy(), weights.numpy()))


def _numbers(x: Tensor) -> Tensor:
    """Whole numbers that change with x: of vectors per token the first entry's bits."""
    x = x.detach()
    if x.dtype == torch.bool and x.ndim == 2 and x.shape[1] % 8 == 0:
        # Eight at once; what it holds decides so, not how it lies, which may differ by rank.
        lies = x if _lies_in_eights(x) else x.clone(memory_format=torch.contiguous_format)
        return lies.view(torch.int64)
    if not x.is_floating_point():
        return x if x.dtype in WHOLE_NUMBERS else x.long()
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return (x[..., 0] if x.ndim > 2 else x).contiguous().view(bits)


def _lies_in_eights(x: Tensor) -> bool:
    """Whether the bytes of each row can be read eight at once; not of a row cut out of another."""
    return x.is_contiguous() and x.stride(0) % 8 == 0 and x.storage_offset() % 8 == 0


@lru_cache(maxsize=8)
def _weights(length: int, device: torch.device) -> Tensor:
    """An odd weight for each place: a sum of numbers times these tells any one change."""
    weights = torch.arange(1, length + 1, device=device) * 0x9E3779B97F4A7C1
    weights ^= weights >> 29
    return weights * 0x3F58476D1CE4E5B9 | 1


def _other_mixers(gathered: Tensor, stages: int) -> Tensor:
    """Whether a rank mixes rows by others than the first rank of its stage, which has some."""
    by_stage = gathered.view(stages, -1, gathered.shape[1])
    first = by_stage[:, :1]
    differ = (by_stage[..., MIXERS] != first[..., MIXERS]) & (first[..., 0] == 1)
    return differ.flatten().to(gathered.dtype)


def _odd(key: str) -> int:
    return zlib.crc32(key.encode()) | 1


def _sentence(gathered: Tensor, every_row: Tensor | None, axes: Sequence[DeviceMesh]) -> str:
    """What differs, where: every rank is compared with the first one."""

    def other_rows(index: int) -> bool:
        """Which are then cut in another way, by the same layout."""
        return every_row is not None and bool((every_row[index] != every_row[0]).any())

    said = []
    for index in range(len(gathered)):
        name, head = _rank_name(index, axes), gathered[index].tolist()
        first = gathered[0].tolist()
        if head[0] == 0:
            said.append(f"{name} refused its batch (its own error says why)")
        elif first[0] and head[1:3] != first[1:3]:
            said.append(
                f"{name} has {head[1]} rows of {head[2]} tokens, not {first[1]} of {first[2]}"
            )
        elif first[0] and head[3] != first[3]:
            said.append(f"{name} has other keys")
        elif first[0] and head[4 : MIXERS + 1] != first[4 : MIXERS + 1] and not other_rows(index):
            said.append(
                f"{name} has another layout, other buckets or another plan (all have the same)"
            )
        if every_row is not None:
            for row, aspect in (every_row[index] != every_row[0]).nonzero()[:3].tolist():
                said.append(f"{name} has other {ASPECTS[aspect]} in row {row}")
    names = [(axis.mesh_dim_names or ("cp",))[0] for axis in axes]
    groups = "cp, tp and pp" if "pp" in names else "cp and tp"
    return (
        f"The ranks of a {groups} group read the same rows, got others than those of "
        f"{_rank_name(0, axes)}: {'; '.join(said)}: give them one batch, by a sampler of "
        f"mesh.size('batch') replicas and rank mesh.rank('batch')."
    )


def _rank_name(index: int, axes: Sequence[DeviceMesh]) -> str:
    names = []
    for axis in axes:
        name = (axis.mesh_dim_names or ("cp",))[0]
        names.append(f"{name} rank {index % axis.size()}")
        index //= axis.size()
    return ", ".join(names)
