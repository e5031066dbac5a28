"""A GPU that is not there notes what would go wrong with one that is."""

import pytest
import torch

from tests.harness.host_of_gpu import host_of_gpu


def beside(read, *, waits=True, record=False):
    """Double something on another stream."""
    stream = torch.cuda.Stream()
    if waits:
        stream.wait_stream(torch.cuda.current_stream())
    if record:
        read.record_stream(stream)
    with torch.cuda.stream(stream):
        return 2 * read, stream


def raced(x):
    beside(x, waits=False)


def read_too_early(x):
    out, _ = beside(x)
    return out + 1


def used_again(x):
    beside(x + 1)
    return torch.zeros(8, device="cuda")


def taken_longer(x):
    out, stream = beside(x + 1, record=True)
    torch.cuda.current_stream().wait_stream(stream)
    return torch.zeros(8, device="cuda")


def in_order(x):
    out, stream = beside(x)
    torch.cuda.current_stream().wait_stream(stream)
    return out + torch.zeros(8, device="cuda")


def pinned(x):
    return x + torch.ones(8).pin_memory().to("cuda", non_blocking=True)


@pytest.mark.parametrize(
    ("does", "found"),
    [
        (lambda x: x.sum().item(), "the host waits"),
        (lambda x: x[x > 0], "the host waits"),
        (lambda x: x.cpu(), "the host waits"),
        (lambda x: torch.ones(8).to("cuda", non_blocking=True), "the host waits"),
        (lambda x: torch.tensor([1.0], device="cuda"), "the host waits"),
        (lambda x: x + torch.ones(8), "a tensor of the host"),
        (raced, "a race"),
        (read_too_early, "a race"),
        (used_again, "memory is used again"),
        (taken_longer, "memory stays taken"),
        (lambda x: x.masked_fill(x > 0, 1.0) * 2, None),
        (pinned, None),
        (in_order, None),
    ],
)
def test_what_would_go_wrong_on_a_gpu_is_noted(does, found):
    with host_of_gpu() as gpu:
        does(torch.zeros(8, device="cuda"))
    assert [kind.startswith(found) for kind in gpu.found] == [True] if found else not gpu.found
