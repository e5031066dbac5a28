"""Makes transformers' layers use plain torch operations: GPU kernels do not run on a CPU."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType

KERNEL_PACKAGES = ("fla", "causal_conv1d", "mamba_ssm")
"""What transformers uses where it can be imported, whether or not there is a GPU."""


@contextmanager
def without_gpu_kernels() -> Iterator[None]:
    """Hide packages of kernels from what is imported inside."""
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if _is_kernel(name)}
    finder = _Hides()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        sys.modules.update(hidden)


class _Hides:
    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if _is_kernel(name):
            raise ModuleNotFoundError(f"{name} is hidden: the check runs on a CPU.")
        return None


def _is_kernel(name: str) -> bool:
    return name.partition(".")[0] in KERNEL_PACKAGES
