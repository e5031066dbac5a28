"""Transfers between ranks: on a stream of their own, and through host memory where gloo has them.

Ranks that share one GPU cannot use NCCL, which wants a GPU for each. Gloo then carries what they
exchange: all-to-all and transfers between two ranks go through host memory here, and other
collectives of CUDA tensors gloo stages by itself. That is slow, and it is the whole path: the
strategies, autograd, FSDP and the compiler of a run on many ranks, on one card.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch import distributed as dist

from dtcp.distributed.groups import backend_of

LOG = logging.getLogger("dtcp.distributed")


def is_staged(x: Tensor, group: dist.ProcessGroup) -> bool:
    """Whether x has to go through host memory; said once, when something first does."""
    if not x.is_cuda or backend_of(group, "cuda") != "gloo":
        return False
    _say_so()
    return True


@cache
def _say_so() -> None:
    LOG.warning(
        "Tensors on a GPU travel over gloo, through host memory: right for ranks that share a "
        "card, slow for others, which want init_process_group('nccl')."
    )


def exchange(
    out: Tensor,
    x: Tensor,
    group: dist.ProcessGroup,
    *,
    receive: Sequence[int] | None = None,
    send: Sequence[int] | None = None,
) -> None:
    """`dist.all_to_all_single` into `out`, through host memory where that is the way.

    Args:
        out, x: contiguous.
        receive, send: how much of dim 0, by rank; None for equal parts.
    """
    counts = (
        None if receive is None else list(receive),
        None if send is None else list(send),
    )
    if _is_left_out(x, group):
        return
    if not is_staged(x, group):
        dist.all_to_all_single(out, x, counts[0], counts[1], group=group)
        return
    arrived = torch.empty(out.shape, dtype=out.dtype, device="cpu")
    dist.all_to_all_single(arrived, x.cpu(), counts[0], counts[1], group=group)
    out.copy_(arrived)


def _is_left_out(x: Tensor, group: dist.ProcessGroup) -> bool:
    """The group of a dry run repeats what is sent, and refuses to where that is nothing (2.13)."""
    return not x.numel() and backend_of(group, x.device.type) == "fake"


def start_exchange(
    x: Tensor, group: dist.ProcessGroup, *, receive: Sequence[int], send: Sequence[int]
) -> "Transfer":
    """`exchange` on its way when this returns; through host memory, it is over by then.

    Args:
        x: contiguous.
    """
    out = x.new_empty(sum(receive), *x.shape[1:])
    if is_staged(x, group) or _is_left_out(x, group):
        exchange(out, x, group, receive=receive, send=send)
        return Transfer(out, lambda: None, x)
    counts = list(receive), list(send)
    work = dist.all_to_all_single(out, x, *counts, group=group, async_op=True)
    works = [] if work is None else [work]
    return Transfer(out, lambda: _wait_for(works), x)


@contextmanager
def transfer_stream(device: torch.device) -> Iterator[None]:
    """What is launched here runs beside what is launched after it: packing, and the transfer.

    It waits for what was launched before; `Transfer.wait` puts what follows behind the transfer. So
    memory that the host gives back can be used again at once, by either stream, provided that what
    is read here is held until `wait`. With `record_stream` it would stay taken until the GPU gets
    there, which the host is layers ahead of.
    """
    if device.type != "cuda":
        yield
        return
    here = torch.cuda.current_stream(device)
    beside = _stream_beside(here)
    beside.wait_stream(here)
    with torch.cuda.stream(beside):
        yield


@cache
def _stream_beside(stream: torch.cuda.Stream) -> torch.cuda.Stream:
    # Of high priority: a kernel that packs 16 MB must not queue behind one that computes. One for
    # each stream: memory given back by another would not have been waited for.
    return torch.cuda.Stream(stream.device, priority=-1)


@dataclass
class Transfer:
    """A transfer in flight; `wait` gives what arrived, on the stream that it was started beside."""

    arrived: Tensor
    finish: Callable[[], None]
    held: Tensor  # the sent rows, kept alive until the transfer is over

    def wait(self) -> Tensor:
        self.finish()
        return self.arrived


@dataclass(frozen=True)
class Between:
    """The two ranks that a transfer is to and from, as global ranks.

    Args:
        tag: tells apart transfers between the same two ranks.
    """

    target: int
    source: int
    group: dist.ProcessGroup
    tag: int

    def post(self, rows: Tensor, arrived: Tensor) -> list[dist.Work]:
        """Send rows and receive into `arrived`; what is empty is neither sent nor received."""
        moves = []
        if rows.shape[0]:
            moves.append(dist.P2POp(dist.isend, rows, self.target, self.group, self.tag))
        if arrived.shape[0]:
            moves.append(dist.P2POp(dist.irecv, arrived, self.source, self.group, self.tag))
        return dist.batch_isend_irecv(moves) if moves else []


def send_and_receive(rows: Tensor, count: int, between: Between) -> Transfer:
    """Send rows and receive `count` of them, while whatever is launched next computes."""
    arrived = rows.new_empty(count, *rows.shape[1:])
    if is_staged(rows, between.group):
        return _staged(rows, arrived, between)
    works = between.post(rows, arrived)
    if works or not rows.is_cuda:
        return Transfer(arrived, lambda: _wait_for(works), rows)
    # Nothing moves, but what led up to it runs on this stream: what that reads is held until then.
    beside = torch.cuda.current_stream(rows.device)
    return Transfer(arrived, lambda: _wait_for_stream(beside), rows)


def _staged(rows: Tensor, arrived: Tensor, between: Between) -> Transfer:
    """The same over copies in host memory."""
    pinned = rows.is_cuda
    there, back = (
        torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=pinned)
        for x in (rows, arrived)
    )
    there.copy_(rows, non_blocking=True)
    copied = torch.cuda.Event() if pinned else None
    if copied is not None:
        copied.record()

    def carry() -> None:
        if copied is not None:
            copied.synchronize()
        _wait_for(between.post(there, back))

    # A thread waits for the copy, so that the launches of what is computed meanwhile need not.
    thread = ThreadPoolExecutor(max_workers=1)
    carried = thread.submit(carry)
    thread.shutdown(wait=False)

    def finish() -> None:
        carried.result()
        arrived.copy_(back, non_blocking=True)

    # `back` is freed after that copy: the allocator of pinned memory waits for it.
    return Transfer(arrived, finish, rows)


def _wait_for(works: Sequence[dist.Work]) -> None:
    for work in works:
        work.wait()


def _wait_for_stream(beside: torch.cuda.Stream) -> None:
    torch.cuda.current_stream(beside.device).wait_stream(beside)
