"""Counts torch's collectives, those of DTensor and FSDP; dtcp's count themselves."""

from collections import Counter
from typing import Any

from torch.distributed.tensor import DTensor

from dtcp._torch.ops import TorchDispatchMode


class CollectiveCalls(TorchDispatchMode):
    """Counts the collectives of torch that run inside.

    torch's own CommDebugMode also tracks modules, and loses track where one of several is called
    on DTensors (2.13). Like every dispatch mode this one makes dynamo run eager.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            # What it communicates is dispatched again, on local tensors.
            return NotImplemented
        name = func.name()
        if name.startswith(("_c10d_functional::", "c10d::")) and "wait_tensor" not in name:
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))
