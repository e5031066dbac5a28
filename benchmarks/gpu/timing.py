"""Time on a device, by its own clock where it has one."""

import statistics
import time
from collections.abc import Callable

import torch

LEAST_REPEATS, MOST_REPEATS, SECONDS = 3, 20, 0.4
FLUSH = 256 * 2**20
"""Bytes written before a timed call: several times what a GPU keeps in its L2."""


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Median seconds of a call: at least three, then as many as fit; after one that warms up.

    On a GPU calls are launched one behind another, as the layers of a model are, and the GPU's own
    clock is read: what the host does meanwhile counts where it takes longer than the GPU.
    """
    _once(call, device)
    times = [_once(call, device)]
    more = min(MOST_REPEATS, max(LEAST_REPEATS, int(SECONDS / max(times[0], 1e-9)))) - 1
    if device.type == "cuda":
        times += _in_a_row(call, more, device)
    else:
        times += [_once(call, device) for _ in range(more)]
    return statistics.median(times)


def host_seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Seconds that a host takes to launch a call, least of three: a GPU that takes less waits."""
    call()
    times = []
    for _ in range(3):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    torch.cuda.synchronize(device)
    return min(times)


def _once(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        return _in_a_row(call, 1, device)[0]
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _in_a_row(call: Callable[[], object], number: int, device: torch.device) -> list[float]:
    """Seconds of each of so many calls, none of which the host waits for before the last."""
    flush = torch.empty(FLUSH, dtype=torch.int8, device=device)
    pairs = []
    for _ in range(number):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        call()
        stop.record()
        pairs.append((start, stop))
    torch.cuda.synchronize(device)
    return [float(start.elapsed_time(stop)) / 1e3 for start, stop in pairs]
