"""Time on a device, by its own clock where it has one."""

import statistics
import time
from collections.abc import Callable

import torch

LEAST_REPEATS, SECONDS = 3, 0.4


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Median seconds of a call: at least three, then as many as fit; after one that warms up."""
    _once(call, device)
    times: list[float] = []
    while len(times) < LEAST_REPEATS or (sum(times) < SECONDS and len(times) < 20):
        times.append(_once(call, device))
    return statistics.median(times)


def _once(call: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    start_event, stop_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start_event.record()
    call()
    stop_event.record()
    stop_event.synchronize()
    return float(start_event.elapsed_time(stop_event)) / 1e3
