"""What inductor needs of a machine, and what to do where it is missing."""

import shutil
import sysconfig
from pathlib import Path
from typing import Protocol

import torch

from dtcp._torch.compiler import inductor_compilers

FALLBACK = "aot_eager"


class CompileSettings(Protocol):
    """What is read and set of torchtitan's `CompileConfig`, without importing it."""

    enable: bool
    backend: str


def missing_for_inductor() -> str:
    """What keeps inductor from compiling for this machine's CPU, or nothing.

    It writes C++ and loads the result as a Python extension.
    """
    if not any(shutil.which(name) for name in (*inductor_compilers(), "g++", "clang++")):
        return "a C++ compiler (g++ or clang++)"
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").exists():
        return f"Python's headers ({headers / 'Python.h'})"
    return ""


def use_what_works(compile: CompileSettings) -> str:
    """Trace with another backend where inductor cannot work: same graphs, no fused kernels.

    Returns:
        what to tell the person, or nothing.
    """
    if not compile.enable or compile.backend != "inductor" or torch.accelerator.is_available():
        return ""
    missing = missing_for_inductor()
    if not missing:
        return ""
    compile.backend = FALLBACK
    return f"compile     {FALLBACK}: inductor lacks {missing} here; install it for fused kernels"
