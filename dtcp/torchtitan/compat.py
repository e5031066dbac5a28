"""What torchtitan 0.3.0 needs to run without a GPU and on torch older than 2.14.

Imported before any other part of torchtitan, which binds the device module at its own import.
Every patch is guarded by the fact that makes it necessary, and says what breaks without it:

    torch           2.11    2.12    2.13    2.14
    cpu device      x       x       x       x       only where there is no accelerator
    set_timeout     x       x       x       -
    mesh dims       x       -       -       -

torchtitan's wheel names no torch in its requirements, so nobody else checks the pair.
"""

import os
import platform
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed.fsdp as fsdp

from dtcp._torch.collectives import SET_PROCESS_GROUP_TIMEOUT
from dtcp._torch.mesh import available_device_type

PINNED = "0.3.0"

REMOVED_SINCE = (
    "components/dataloader.py",
    "distributed/full_dtensor.py",
    "distributed/parallel_dims.py",
)
"""Modules of 0.3.0 that its main branch lacks, whatever version that says it is."""


class CpuDevice:
    """`torch.cpu` with the rest of the device interface that torchtitan calls.

    "Device memory" is the resident set of this process; its peak is the kernel's high-water
    mark, which cannot be reset.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)

    def current_device(self) -> int:
        # torch.cpu answers "cpu", and barrier(device_ids=["cpu"]) is a TypeError.
        return 0

    def get_device_name(self, device: torch.device | None = None) -> str:
        return platform.processor() or platform.machine()

    def get_device_properties(self, device: torch.device | None = None) -> SimpleNamespace:
        pages, page = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
        return SimpleNamespace(total_memory=pages * page)

    def memory_stats(self, device: torch.device | None = None) -> dict[str, int]:
        peak = _resident_peak()
        return {
            "active_bytes.all.peak": peak,
            "reserved_bytes.all.peak": peak,
            "num_alloc_retries": 0,
            "num_ooms": 0,
        }

    def reset_peak_memory_stats(self) -> None: ...

    def empty_cache(self) -> None: ...


def _resident_peak() -> int:
    """Bytes of the largest resident set this process ever had."""
    # ru_maxrss counts KiB on Linux and bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def fsdp_reads_annotations() -> bool:
    """Whether `fully_shard` takes the plain parameters that spmd_types annotates (torch 2.14)."""
    return tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 14)


class DataParallelMeshDims:
    """Stands in for the class of torch 2.12; nothing makes one below torch 2.14."""


def _check_release() -> None:
    """Refuse another release before anything of it is imported, a checkout of one as well.

    Raises:
        ImportError: with the name "torchtitan", for train.py to say in one line.
    """
    spec = find_spec("torchtitan")
    if spec is None or not spec.submodule_search_locations:
        found = "none"
    else:
        folder = Path(spec.submodule_search_locations[0])
        missing = [name for name in REMOVED_SINCE if not (folder / name).is_file()]
        # A build's own mark, as in 0.3.0+cu130, is no other release; a candidate of one (rc1) is.
        if _version_of(folder).partition("+")[0] == PINNED and not missing:
            return
        found = f"{_version_of(folder)} in {folder}" + (f" without {missing}" if missing else "")
    raise ImportError(
        f"dtcp's adapter knows torchtitan {PINNED}, got torchtitan={found}: pip install "
        f"'dtcp[train]', or torchtitan=={PINNED}.",
        name="torchtitan",
    )


def _version_of(folder: Path) -> str:
    """What a checkout says of itself, or else the installed distribution."""
    own = folder.parent / "assets" / "version.txt"
    if own.is_file():
        return own.read_text().strip()
    try:
        return version("torchtitan")
    except PackageNotFoundError:
        return "of no version"


def _provide_cpu_device() -> None:
    """Without an accelerator torchtitan falls back to "cuda" and dies in set_device."""
    if available_device_type() is not None:
        return
    if "torchtitan.distributed.utils" in sys.modules:
        raise ImportError(
            "dtcp.torchtitan must be imported before torchtitan, which binds its device at "
            "import, got torchtitan imported first: import dtcp.torchtitan at the top."
        )
    import torchtitan.tools.utils as titan_utils

    titan_utils.device_type, titan_utils.device_module = "cpu", CpuDevice()
    # No table has the peak of a CPU. Infinity reads as 0% and spares each rank a call of lspci.
    titan_utils.get_peak_flops = lambda device_name: float("inf")


def _provide_set_timeout() -> None:
    """`Trainer.train` calls torch.distributed.set_timeout (2.14) after its first step."""
    if not hasattr(torch.distributed, "set_timeout"):
        torch.distributed.set_timeout = SET_PROCESS_GROUP_TIMEOUT


def _provide_mesh_dims() -> None:
    """torchtitan.distributed.fsdp imports the name (2.12) for what FSDP takes from 2.14 on."""
    if not hasattr(fsdp, "DataParallelMeshDims"):
        fsdp.DataParallelMeshDims = DataParallelMeshDims


_check_release()
_provide_set_timeout()
_provide_mesh_dims()
_provide_cpu_device()


@contextmanager
def without_spmd_types() -> Iterator[None]:
    """Inside, torchtitan's models compute as on one device; spmd_types asks for a mesh (0.3.0)."""
    from torchtitan.distributed import utils

    before = utils.get_spmd_backend()
    utils.set_spmd_backend("partial_dtensor")
    try:
        yield
    finally:
        utils.set_spmd_backend(before)


@contextmanager
def float64_by_name() -> Iterator[None]:
    """Let a config name float64, which torchtitan's table of dtypes lacks, while a run is built."""
    from torchtitan.config import TORCH_DTYPE_MAP

    TORCH_DTYPE_MAP["float64"] = torch.float64
    try:
        yield
    finally:
        del TORCH_DTYPE_MAP["float64"]
