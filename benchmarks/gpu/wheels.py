"""What a machine without a network lacks, fetched and packed where there is one.

Wheels are unpacked and packed again into one archive, which is compressed better than they are, and
cut into parts that a transfer takes. On the other side `unpack_whole` puts them together again, and
`add_packages` on the path of a process.
"""

import io
import lzma
import shutil
import site
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any

TRANSFER = Path("build/gpu/transfer")
PACKAGES = Path("build/gpu/packages")
COMPILED = Path("build/gpu/compiled")
ARCHIVE = "packages.tar.xz"
PART = 48 * 2**20
"""Bytes; a transfer takes 64 MiB, in which the project travels too."""
MOST_PARTS = 2
PYTHON = "3.12"
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_24_x86_64", "manylinux2014_x86_64")
WHEELS = (
    "flash-attn-4==4.0.0b36",
    "quack-kernels==0.6.4",
    "ffpa-attn==0.2.4",
    "nvidia-cutlass-dsl==4.6.2",
    "nvidia-cutlass-dsl-libs-base==4.6.2",
    "nvidia-cutlass-dsl-libs-core==4.6.2",
    "nvidia-cutlass-dsl-libs-cu13==4.6.2",
    "apache-tvm-ffi<0.2",
    "torch-c-dlpack-ext",
    "cuda-python<14",
    "cuda-bindings<14",
    "cuda-pathfinder",
    "protobuf<7",
    "nvidia-cuda-nvdisasm<14",
    "einops",
    "fla-core==0.6.0",
    "packaging",
)
"""With --no-deps: torch, triton and numpy are there already."""


def prepare(transfer: Path = TRANSFER) -> str:
    """Fetch the wheels and pack them; what lies where."""
    with tempfile.TemporaryDirectory() as folder:
        wheels, packages = Path(folder) / "wheels", Path(folder) / "packages"
        platforms = [each for name in PLATFORMS for each in ("--platform", name)]
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary", ":all:", "--python-version", PYTHON, *platforms]
        subprocess.run([*command, "--dest", str(wheels), *WHEELS], check=True)
        for wheel in sorted(wheels.glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(packages)
        pack(packages, transfer)
    parts = len(parts_in(transfer))
    if parts > MOST_PARTS:
        raise ValueError(
            f"Packages travel in {MOST_PARTS} parts of {PART / 2**20:.0f} MiB, got {parts}: leave "
            f"some of WHEELS out."
        )
    return describe_transfer(transfer)


def pack(packages: Path, transfer: Path, *, part: int = PART) -> None:
    """Compress a folder into parts of at most `part` bytes."""
    buffer = io.BytesIO()
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 6}]
    with (
        lzma.open(buffer, "wb", filters=filters) as compressed,
        tarfile.open(fileobj=compressed, mode="w|") as archive,
    ):
        archive.add(packages, arcname=".")
    shutil.rmtree(transfer, ignore_errors=True)
    transfer.mkdir(parents=True)
    data = buffer.getvalue()
    # Of equal size, so that each leaves as much room as it can.
    size = -(-len(data) // -(-len(data) // part))
    for index, start in enumerate(range(0, len(data), size)):
        name = f"{ARCHIVE}.{index + 1}of{-(-len(data) // size)}"
        (transfer / name).write_bytes(data[start : start + size])


def unpack(transfer: Path, packages: Path) -> None:
    """Put the parts together and unpack them; the folder is there once it is complete."""
    data = b"".join(path.read_bytes() for path in parts_in(transfer))
    part = packages.with_name(f"{packages.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:xz") as archive:
        archive.extractall(part, filter="data")
    part.rename(packages)


def parts_in(transfer: Path) -> list[Path]:
    """The parts of the archive that are there, in order."""
    return sorted(transfer.glob(f"{ARCHIVE}.*of*"))


def unpack_whole(transfer: Path = TRANSFER, packages: Path = PACKAGES) -> None:
    """Unpack what was transferred, if all of it is there: before several processes use it."""
    parts = parts_in(transfer)
    whole = bool(parts) and len(parts) == int(parts[0].name.rpartition("of")[2])
    if packages.exists() or not whole or not _is_for_this_python():
        return
    unpack(transfer, packages)
    # Once and on all cores, rather than by each of the processes that import them at once.
    compile_all = [sys.executable, "-m", "compileall", "-qq", "-j", "0", str(packages)]
    subprocess.run(compile_all, check=False)


def add_packages(transfer: Path = TRANSFER, packages: Path = PACKAGES) -> str:
    """Make what was unpacked importable; what came of it."""
    if not packages.exists():
        parts = parts_in(transfer)
        some = f", {len(parts)} parts of more are there" if parts else ""
        if parts and not _is_for_this_python():
            some = f", what is in {transfer} is for Python {PYTHON}"
        return f"No packages were transferred{some}: what is installed here is measured."
    site.addsitedir(str(packages.resolve()))
    sys.meta_path.insert(0, _NotImported("jax"))
    return f"Packages of {packages} are on the path."


def _is_for_this_python() -> bool:
    return f"{sys.version_info.major}.{sys.version_info.minor}" == PYTHON


class _NotImported(MetaPathFinder, Loader):
    """Lets the import of a package fail, as where it is not installed.

    cutlass, on which FlashAttention 4 stands, imports jax where there is one: seconds for each
    process, and one more package whose version would have to agree.
    """

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        return spec_from_loader(name, self) if name == self.package else None

    def exec_module(self, module: ModuleType) -> None:
        raise ImportError(f"{module.__name__} is not imported by the campaign")


def compile_caches(folder: Path = COMPILED) -> dict[str, str]:
    """The environment in which processes of the campaign share what each has compiled."""
    folder = folder.resolve()
    return {
        "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED": "1",
        "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR": str(folder / "flash"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        # Several processes compile at once.
        "TORCHINDUCTOR_COMPILE_THREADS": "4",
    }


def describe_transfer(transfer: Path = TRANSFER) -> str:
    """What is prepared for a machine without a network."""
    parts = parts_in(transfer)
    if not parts:
        return (
            f"No packages are prepared for a machine without a network: "
            f"python -m benchmarks.gpu --prepare fetches {', '.join(WHEELS[:4])} and what they "
            f"need into {transfer}."
        )
    sizes = ", ".join(f"{path.name} {path.stat().st_size / 2**20:.1f} MiB" for path in parts)
    return f"Prepared in {transfer}, for Python {PYTHON}: {sizes}; a transfer takes 64 MiB."
