"""In a block, "cuda" is a GPU that is not there, of which the host does all that it would do."""

import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch import distributed as dist
from torch.utils._pytree import tree_leaves, tree_map

from dtcp.distributed import staging
from dtcp.kernels.fla_support import has_fla
from dtcp.kernels.softmax import api, demand
from dtcp.kernels.softmax.libraries.flash4 import Flash4Functions
from tests.harness.gpu_launches import CUDA, META, HostOfGpu, Transfer, is_cuda, on_gpu

SELF_TESTS = (
    "dtcp.kernels.softmax.api._self_test",
    "dtcp.kernels.sparse.api._triton_fault",
    "dtcp.kernels.sparse.api._fault",
    "dtcp.kernels.sparse.index_kernel._fault",
    "dtcp.kernels.delta_rule.self_test._fault",
)
"""They wait for a GPU, and may."""


@contextmanager
def host_of_gpu(
    *, capability: tuple[int, int] = (9, 0), shared: int = 227, flash: bool = False
) -> Iterator[HostOfGpu]:
    """Yields what goes on; "cuda" has that compute capability.

    Args:
        shared: KiB of shared memory that a block of threads may have.
        flash: whether FlashAttention 4 is installed.
    """
    gpu = HostOfGpu()
    patches = _of_torch(gpu) | _of_cuda(gpu, capability, shared) | _of_nccl(gpu) | _of_triton(gpu)
    patches |= _of_kernels(capability) | (_of_flash(gpu) if flash else {})
    with ExitStack() as stack:
        for name, value in patches.items():
            stack.enter_context(mock.patch(name, value, create=True))
        stack.callback(staging._stream_beside.cache_clear)
        stack.callback(
            torch.use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled()
        )
        torch.use_deterministic_algorithms(False)
        stack.enter_context(gpu)
        yield gpu


def _of_torch(gpu: HostOfGpu) -> dict[str, Any]:
    device, to, tensor = Tensor.device, Tensor.to, torch.tensor

    def moved(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        args, kwargs = tree_map(lambda y: META if is_cuda(y) else y, (args, kwargs))
        return to(x, *args, **kwargs)

    def made(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        out = tensor(data, *args, **kwargs)
        if not is_cuda(device):
            return to(out, device) if device is not None else out
        gpu.note("the host waits", f"torch.tensor on the GPU {tuple(out.shape)}")
        return torch.empty_like(out, device=META)

    def pin_memory(x: Tensor, device: Any = None) -> Tensor:
        out = x.clone()
        gpu.pin(out)
        return out

    return {
        # What a mask chooses is all of it: its number is noted as waited for.
        "torch.fx.experimental._config.meta_nonzero_assume_all_nonzero": True,
        "torch.Tensor.device": property(
            lambda x: CUDA if x.is_meta and not gpu.inside else device.__get__(x)
        ),
        "torch.Tensor.is_cuda": property(lambda x: x.is_meta and not gpu.inside),
        "torch.Tensor.get_device": lambda x: 0 if x.is_meta else -1,
        "torch.Tensor.to": moved,
        "torch.Tensor.pin_memory": pin_memory,
        "torch.Tensor.record_stream": lambda x, other: gpu.memory_of(x).recorded.add(other.name),
        "torch.tensor": made,
    }


def _of_cuda(gpu: HostOfGpu, capability: tuple[int, int], shared: int) -> dict[str, Any]:
    @contextmanager
    def device(*args: Any) -> Iterator[None]:
        yield

    properties = SimpleNamespace(
        shared_memory_per_block_optin=shared << 10, multi_processor_count=132
    )
    found: dict[str, Callable[..., Any]] = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "device_count": lambda: 8,
        "get_device_capability": lambda device=None: capability,
        "get_device_properties": lambda device=None: properties,
        "synchronize": lambda device=None: gpu.note("the host waits", "synchronize"),
        "device": device,
        "device_of": device,
        "current_stream": lambda device=None: gpu.stream,
        "stream": gpu.on,
        "Stream": gpu.new_stream,
    }
    return {f"torch.cuda.{name}": value for name, value in found.items()}


def _of_nccl(gpu: HostOfGpu) -> dict[str, Any]:
    """What it asks of its arguments, and on which stream it is."""

    def started(async_op: bool, reads: list[Tensor], writes: list[Tensor]) -> Transfer | None:
        for x in (*reads, *writes):
            assert x.is_contiguous()
            if not x.is_meta:
                gpu.note("a tensor of the host", f"NCCL {tuple(x.shape)}")
        transfer = Transfer(gpu, on_gpu(reads), on_gpu(writes))
        if async_op:
            return transfer
        transfer.wait()
        return None

    def all_to_all(out, x, received=None, sent=None, group=None, async_op=False):
        ranks = dist.get_world_size(group)
        for whole, counts in ((out, received), (x, sent)):
            size = sum(counts) if counts else whole.shape[0] // ranks * ranks
            assert size == whole.shape[0] and len(counts or range(ranks)) == ranks
        return started(async_op, [x], [out])

    def gather(out, x, group=None, async_op=False):
        assert out.numel() == x.numel() * dist.get_world_size(group) and out.dtype == x.dtype
        return started(async_op, [x], [out])

    def batch(moves):
        ways = [[x.tensor for x in moves if x.op is op] for op in (dist.isend, dist.irecv)]
        return [started(True, *ways)]

    found = {
        "all_to_all_single": all_to_all,
        "all_gather_into_tensor": gather,
        "all_gather_single": gather,
        "all_reduce": lambda x, op=None, group=None, async_op=False: started(async_op, [], [x]),
        "batch_isend_irecv": batch,
    }
    return {f"torch.distributed.{name}": value for name, value in found.items()}


def _of_triton(gpu: HostOfGpu) -> dict[str, Any]:
    def run(self: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        if callable(grid):
            grid = grid(dict(zip(self.arg_names, args, strict=False)) | kwargs)
        assert all(isinstance(x, int) for x in grid) and all(x < 65_536 for x in grid[1:]), grid
        gpu.launch_triton(self, args, kwargs)

    def tuned(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.fn.run(*args, **{**self.configs[0].all_kwargs(), **kwargs})

    found = {"jit.JITFunction.run": run, "autotuner.Autotuner.run": tuned}
    for name in found:
        importlib.import_module(f"triton.runtime.{name.partition('.')[0]}")
    return {f"triton.runtime.{name}": value for name, value in found.items()}


def _of_kernels(capability: tuple[int, int]) -> dict[str, Any]:
    """Self-tests find nothing, and what is chosen here is not remembered afterwards."""
    found: dict[str, Any] = {name: lambda *demand: None for name in SELF_TESTS}
    found["dtcp.kernels.softmax.api.chosen"] = cache(api.chosen.__wrapped__)
    if has_fla():
        found["fla.ops.cp.context.IS_NVIDIA"] = True
        found["fla.ops.cp.context.get_device_capability"] = lambda index: capability
    return found


def _of_flash(gpu: HostOfGpu) -> dict[str, Any]:
    """FlashAttention 4 for those who ask whether it is installed, and one that computes nothing."""

    def given(name: str, arguments: Any) -> None:
        tensors = [x for x in tree_leaves(arguments) if isinstance(x, Tensor)]
        for x in tensors:
            if not x.is_meta:
                gpu.note("a tensor of the host", f"{name} {tuple(x.shape)}")
        gpu.launch(name, on_gpu(tensors), [])

    def forward(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        given("flash4 forward", (q, k, v, options))
        lse = q.new_zeros(q.shape[:-1], dtype=torch.float32).transpose(-1, -2).contiguous()
        return q.new_zeros(*q.shape[:-1], v.shape[-1]), lse

    def backward(*saved: Tensor, **options: Any) -> None:
        given("flash4 backward", (saved, options))
        for name in ("dq", "dk", "dv"):
            options[name].zero_()

    functions, missing = Flash4Functions(forward, backward, dict, None), demand.missing
    return {
        "dtcp.kernels.softmax.demand.missing": lambda package: (
            None if package is not None and package.name == "flash-attn-4" else missing(package)
        ),
        "dtcp.kernels.softmax.libraries.load._flash4": lambda: functions,
    }
