"""What the host does with a GPU that is not there: launches, copies, waits, streams, lifetimes.

Tensors on it have sizes and no numbers (torch's device "meta" stands for it), those of the host are
real: what the host reads of a batch it reads here. Kernels do nothing. What would go wrong with a
GPU, and with nothing else, is noted: the host waits for it; a kernel is given a tensor of the host;
two streams touch the same memory, and neither waits for the other; memory is used again that
another stream still needs, or stays taken until the GPU gets there; an op does not return what its
fake says. NCCL is a stream of its own, and nobody answers.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA, META = torch.device("cuda", 0), torch.device("meta")
ROOT, HARNESS = str(Path(__file__).parents[2]), str(Path(__file__).parent)
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal"}
WAITS |= {"unique_consecutive", "bincount", "is_nonzero"}
"""Operations whose result, or its size, the host has to know."""
UNTOUCHED = ("empty", "new_empty", "detach")
"""What touches no memory, and is no view."""


class Access(NamedTuple):
    """A kernel reads or writes a part of a storage, somewhere on a stream."""

    stream: str
    writes: bool
    part: tuple[int, int]
    number: int
    place: str

    def meets(self, other: "Access") -> bool:
        """Whether the order of both matters."""
        apart = self.part[1] <= other.part[0] or other.part[1] <= self.part[0]
        return (self.writes or other.writes) and not apart


class Stream:
    """A stream as a clock: how much of each stream is over before what is launched here next."""

    def __init__(self, gpu: "HostOfGpu", name: str) -> None:
        self.gpu, self.name, self.device = gpu, name, CUDA
        self.seen = Counter({name: 0})

    def wait_stream(self, other: "Stream") -> None:
        self.seen |= other.seen

    def is_behind(self, access: Access) -> bool:
        return self.seen[access.stream] >= access.number

    def synchronize(self) -> None:
        self.gpu.note("the host waits", "Stream.synchronize")


class Transfer:
    """What NCCL does, on its own stream: behind all that was launched before on the current one."""

    def __init__(self, gpu: "HostOfGpu", reads: list[Tensor], writes: list[Tensor]) -> None:
        self.gpu, self.held, here = gpu, [*reads, *writes], gpu.stream
        with gpu.on(gpu.nccl):
            gpu.nccl.wait_stream(here)
            gpu.launch("nccl", reads, writes)
            self.done = Counter(gpu.nccl.seen)

    def wait(self) -> None:
        self.gpu.stream.seen |= self.done
        self.held = []


class Memory:
    """A storage: the stream that it was allocated on, who touched it, whom the allocator asks."""

    def __init__(self, stream: Stream, place: str) -> None:
        self.home, self.place, self.recorded = stream, place, {stream.name}
        self.touched: dict[tuple[Any, ...], Access] = {}

    @property
    def is_new(self) -> bool:
        return not any(each.writes for each in self.touched.values())


class HostOfGpu(TorchDispatchMode):
    """Takes what is dispatched to the GPU; `found` counts what would go wrong, by place."""

    def __init__(self) -> None:
        super().__init__()
        self.stream, self.nccl, self.streams = Stream(self, "main"), Stream(self, "nccl"), 0
        self.memory: dict[int, tuple[StorageWeakRef, Memory]] = {}
        self.pinned: dict[int, StorageWeakRef] = {}
        self.found: Counter[str] = Counter()
        self.kernels: Counter[str] = Counter()
        self.inside = False

    def note(self, kind: str, what: str) -> None:
        self.found[f"{kind}: {what}, at {_place()}"] += 1

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before

    def new_stream(self, device: Any = None, priority: int = 0) -> Stream:
        self.streams += 1
        return Stream(self, f"stream {self.streams}")

    def memory_of(self, x: Tensor) -> Memory:
        storage = x.untyped_storage()
        known = self.memory.get(storage._cdata)
        if known is None:
            self._allocate()
            # While it is referred to, its address is no other's.
            known = StorageWeakRef(storage), Memory(self.stream, _place())
            self.memory[storage._cdata] = known
        return known[1]

    def _allocate(self) -> None:
        """On the current stream, where all may be used again that was given back there."""
        here = self.stream
        gone = [
            key
            for key, (reference, memory) in self.memory.items()
            if memory.home is here and reference.expired()
        ]
        for memory in [self.memory.pop(key)[1] for key in gone]:
            if len(memory.recorded) > 1:
                self.note("memory stays taken until the GPU gets there", f"made at {memory.place}")
            for each in memory.touched.values():
                if each.stream not in memory.recorded and not here.is_behind(each):
                    what = f"made at {memory.place}, which {each.stream} needs"
                    self.note(f"memory is used again on {here.name}", what)

    def launch(self, name: str, reads: list[Tensor], writes: list[Tensor]) -> None:
        """A kernel, or a transfer, on the current stream."""
        self.stream.seen[self.stream.name] += 1
        self.kernels[name] += 1
        for x in reads:
            self._touch(x, writes=False)
        for x in writes:
            self._touch(x, writes=True)

    def _touch(self, x: Tensor, *, writes: bool) -> None:
        memory, here, first = self.memory_of(x), self.stream, x.storage_offset()
        if not x.numel():
            return
        pairs = zip(x.shape, x.stride(), strict=True)
        stop = first + 1 + sum((size - 1) * step for size, step in pairs)
        access = Access(here.name, writes, (first, stop), here.seen[here.name], _place())
        for other in memory.touched.values():
            if access.meets(other) and not here.is_behind(other):
                does = ("reads", "writes")
                what = f"{here.name} {does[writes]} what {other.stream} {does[other.writes]}"
                self.note("a race", f"{what} at {other.place}")
        memory.touched[access[:3]] = access

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        made_there, pins = is_cuda(kwargs.get("device")), kwargs.pop("pin_memory", False)
        if made_there:
            kwargs["device"] = META
        elif not any(x.is_meta for x in tensors):
            out = self._run(func, args, kwargs)
            if pins:
                self.pin(out)
            return out
        if func.namespace == "dtcp":
            return self._body(func, args, kwargs)
        with self:
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        name = func._schema.name.partition("::")[2]
        if name in ("_to_copy", "copy_"):
            return self._copy(func, name, args, kwargs)
        if name in WAITS or _is_chosen_by_mask(name, args):
            self.note("the host waits", name)
            if name == "_local_scalar_dense":
                return 0
        of_host = [x for x in tensors if not x.is_meta and x.dim()]
        if of_host and not made_there and not name.startswith("new_"):
            self.note("a tensor of the host", f"{name} {tuple(of_host[0].shape)}")
            args, kwargs = tree_map(_sizes_of, (args, kwargs))
        out = self._run(func, args, kwargs)
        self._launched(func, name, args, kwargs, out)
        return out

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        before, self.inside = self.inside, True
        try:
            return func(*args, **kwargs)
        finally:
            self.inside = before

    def _launched(self, func: Any, name: str, args: Any, kwargs: Any, out: Any) -> None:
        results = on_gpu(out)
        if func.is_view or name.startswith(UNTOUCHED):
            for x in results:
                self.memory_of(x)
            return
        reads: list[Tensor] = []
        writes: list[Tensor] = []
        given = dict(zip((x.name for x in func._schema.arguments), args, strict=False)) | kwargs
        for argument in func._schema.arguments:
            is_written = argument.alias_info is not None and argument.alias_info.is_write
            (writes if is_written else reads).extend(on_gpu(given.get(argument.name)))
        self.launch(name, reads, [*writes, *results])

    def _copy(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """Between devices: of pageable memory the host waits for the copy."""
        target, source = (args[0], args[1]) if name == "copy_" else (None, args[0])
        device = kwargs.get("device") if target is None else target.device
        if device is not None and torch.device(device).type == "cpu":
            if target is None or target.untyped_storage()._cdata not in self.pinned:
                self.note("the host waits", f"a copy to the host {tuple(source.shape)}")
            self.launch(name, on_gpu(source), [])
            dtype = kwargs.get("dtype") or source.dtype
            return torch.zeros(source.shape, dtype=dtype) if target is None else target
        is_large = not source.is_meta and source.dim() and source.numel()
        if is_large and source.untyped_storage()._cdata not in self.pinned:
            self.note("the host waits", f"a copy of pageable memory {tuple(source.shape)}")
        out = self._run(func, args, kwargs)
        self.launch(name, on_gpu(source), on_gpu(out))
        return out

    def pin(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        self.pinned[storage._cdata] = StorageWeakRef(storage)

    def _body(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An op of ours runs, and what its fake says of the results is compared."""
        op = OPDEFS[func._schema.name]
        with self:
            out = op._init_fn(*args, **kwargs)
            like = op._abstract_fn(*args, **kwargs)
        for ours, fake in zip(tree_leaves(out), tree_leaves(like), strict=True):
            if isinstance(ours, Tensor) and _form(ours) != _form(fake):
                self.note("a fake", f"{func} is to return {_form(fake)} and returns {_form(ours)}")
        return out

    def launch_triton(self, kernel: Any, args: Any, kwargs: Any) -> None:
        """A kernel of Triton's; taken as written is what nothing has written yet."""
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        for x in tensors:
            if not x.is_meta:
                self.note("a tensor of the host", f"{kernel.fn.__name__} {tuple(x.shape)}")
        of_each: dict[bool, list[Tensor]] = {True: [], False: []}
        for x in on_gpu(tensors):
            of_each[self.memory_of(x).is_new].append(x)
        self.launch(kernel.fn.__name__, of_each[False], of_each[True])


def _place() -> str:
    """The innermost three functions of the project."""
    frame: Any = sys._getframe(1)
    places: list[str] = []
    while frame is not None and len(places) < 3:
        name = frame.f_code.co_filename
        if name.startswith(ROOT) and not name.startswith(HARNESS):
            places.append(f"{name[len(ROOT) + 1 :]}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back
    return " < ".join(places)


def _form(x: Tensor) -> tuple[Any, ...]:
    pairs = zip(x.stride(), x.shape, strict=True) if x.numel() else ()
    return tuple(x.shape), tuple(step for step, size in pairs if size > 1), x.dtype


def on_gpu(x: Any) -> list[Tensor]:
    return [each for each in tree_leaves(x) if isinstance(each, Tensor) and each.is_meta]


def _sizes_of(x: Any) -> Any:
    return torch.empty_like(x, device=META) if isinstance(x, Tensor) else x


def is_cuda(device: Any) -> bool:
    return isinstance(device, str | torch.device) and torch.device(device).type in ("cuda", "meta")


def _is_chosen_by_mask(name: str, args: Any) -> bool:
    if not name.startswith(("index", "_index_put", "_unsafe_index")) or len(args) < 2:
        return False
    masks = [x for x in tree_leaves(args[1]) if isinstance(x, Tensor)]
    # A number is put where a mask says, however often that is.
    put = "put" in name and args[2].dim() == 0
    return any(x.dtype in (torch.bool, torch.uint8) for x in masks) and not put
