"""Print the backends of attention: what each can do, and whether it can be used here.

python -m dtcp.kernels
python -m dtcp.kernels --markdown     # without this machine, as docs/kernels.md has it
"""

import argparse
import sys
from collections.abc import Mapping, Sequence

import torch

from dtcp.kernels.softmax.backends import BACKENDS, Ability, Backend
from dtcp.kernels.softmax.calls import CallKind
from dtcp.kernels.softmax.demand import missing, version_of
from dtcp.kernels.sparse.blocks import widest_columns

GPUS: Mapping[int, str] = {
    8: "Ampere, Ada",
    9: "Hopper",
    10: "Blackwell",
    12: "RTX Blackwell",
    0: "CPU",
}
SPARSE_GPUS: Mapping[str, tuple[int, int]] = {
    "A100": (8, 163),
    "L40S, RTX 4090": (8, 99),
    "H100, H200": (9, 227),
    "B200": (10, 227),
    "RTX 5090": (12, 99),
}
"""By their names: compute capability, and KiB of shared memory that a block of threads may use."""
SPARSE_HEAD = ("triton's sparse attention on", "channels in bf16, fp16", "in fp32")
HEAD = ("backend", "on", "heads", "masks", "packed", "softcap", "bias", "repeats itself", "TFLOP/s")


def print_backends(arguments: Sequence[str]) -> int:
    """Print the table; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m dtcp.kernels", description="The backends of attention, as a table."
    )
    parser.add_argument("--markdown", action="store_true", help="without this machine")
    markdown = parser.parse_args(arguments).markdown
    print(_table(HEAD, [row for backend in BACKENDS for row in _rows(backend)]))
    print(f"\n{_table(SPARSE_HEAD, [_sparse_row(gpu) for gpu in SPARSE_GPUS])}")
    if not markdown:
        print(f"\n{_table(('backend', 'installed here'), [_here(each) for each in BACKENDS])}")
        print(f"\n{_device()}")
    return 0


def _rows(backend: Backend) -> list[tuple[str, ...]]:
    return [
        (backend.name, GPUS[major], *_cells(backend, ability))
        for major, abilities in backend.on.items()
        if major in GPUS and not (major == 0 and backend.name == "triton")
        for ability in abilities
    ]


def _cells(backend: Backend, ability: Ability) -> tuple[str, ...]:
    kinds = ", ".join(kind.value for kind in CallKind if kind in ability.kinds)
    if not ability.skewed:
        kinds += " (as many queries as keys)"
    repeats = backend.repeats.value
    if not ability.repeats_interval:
        repeats += ", intervals never"
    speed = f"{'' if ability.measured else '~'}{ability.speed}" if ability.speed else ""
    can = (ability.packed, ability.softcap, ability.bias)
    return str(ability.widths), kinds, *("yes" if x else "no" for x in can), repeats, speed


def _sparse_row(gpu: str) -> tuple[str, ...]:
    major, kib = SPARSE_GPUS[gpu]
    widths = (widest_columns(x, major, kib * 1024) for x in (torch.bfloat16, torch.float32))
    return gpu, *(f"up to {width}" for width in widths)


def _here(backend: Backend) -> tuple[str, str]:
    package = backend.package
    if package is None and 0 not in backend.on and torch.version.cuda is None:
        return backend.name, f"needs a CUDA build of torch, got {torch.__version__}"
    if package is None:
        return backend.name, f"yes, with torch {torch.__version__}"
    return backend.name, missing(package) or f"yes, {package.name} {version_of(package)}"


def _device() -> str:
    if not torch.cuda.is_available():
        return "There is no GPU here: attention is computed by reference."
    major, minor = torch.cuda.get_device_capability()
    runs = [backend.name for backend in BACKENDS if major in backend.on]
    return f"{torch.cuda.get_device_name()} (sm_{major}{minor}) is served by {', '.join(runs)}."


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, columns aligned."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


if __name__ == "__main__":
    sys.exit(print_backends(sys.argv[1:]))
