"""What every backend of softmax attention can do, as data: one table, read by all that choose.

A number for speed is TFLOP/s forward of causal attention with heads of 128 (of 512 for ffpa), as
published or, with a tilde in the docs, expected; `benchmarks.gpu` measures them, and the results
belong here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

import torch

from dtcp.kernels.softmax.calls import CallKind
from dtcp.kernels.softmax.types import AUTO

RECTANGLE, CAUSAL = CallKind.RECTANGLE, CallKind.CAUSAL
WINDOW, INTERVAL = CallKind.WINDOW, CallKind.INTERVAL
HALF = (torch.float16, torch.bfloat16)


class Repeats(Enum):
    """Whether backward gives the same bits twice."""

    ALWAYS = "always"
    ON_REQUEST = "on request"  # torch.use_deterministic_algorithms
    NEVER = "never"


@dataclass(frozen=True)
class HeadWidths:
    """Widths of keys and values that a kernel takes: from least to most, multiples of step.

    Args:
        unequal: whether keys and values may be of different widths.
        unshared: the same where no query heads share a kv head, as of keys made of latents.
        pairs: (key, value) widths that it takes besides.
    """

    least: int
    most: int
    step: int = 8
    unequal: bool = False
    unshared: bool = False
    pairs: tuple[tuple[int, int], ...] = ()

    def take(self, key: int, value: int, group: int) -> bool:
        """Whether it takes these widths, with so many query heads to a kv head."""
        inside = all(self.least <= x <= self.most and x % self.step == 0 for x in (key, value))
        alike = key == value or self.unequal or (self.unshared and group == 1)
        return (inside and alike) or (key, value) in self.pairs

    def __str__(self) -> str:
        inside = f"{self.least} to {self.most}" if self.least < self.most else f"{self.most}"
        inside = "any" if self.most > 1024 else inside
        unshared = ["unequal if unshared"] * self.unshared
        return ", ".join([inside, *unshared, *(f"{k} / {v}" for k, v in self.pairs)])


@dataclass(frozen=True)
class Ability:
    """What a backend does on GPUs of one architecture, forward and backward.

    Args:
        kinds: of calls.
        speed: TFLOP/s, see above.
        packed: several sequences in one call.
        skewed: other numbers of queries than of keys under a diagonal.
        measured: whether the speed is published or measured, not expected.
        repeats_interval: whether an INTERVAL repeats itself where the backend does.
        bias: scores with a bias by distance.
    """

    widths: HeadWidths
    kinds: frozenset[CallKind]
    speed: int
    packed: bool = True
    skewed: bool = True
    softcap: bool = True
    measured: bool = False
    repeats_interval: bool = True
    bias: bool = False


@dataclass(frozen=True)
class Package:
    """What a backend needs besides torch.

    Args:
        name: of the distribution.
        least, below: versions whose interface is known.
        install: what to do to have it.
        module: imported instead of asking for the distribution, where its name varies.
    """

    name: str
    least: str
    below: str
    install: str
    module: str = ""


@dataclass(frozen=True)
class Backend:
    """A backend: its name, where it runs, and what it needs.

    Args:
        on: what it does, by the major compute capability of a GPU; 0 is any other device.
        dtypes: of q, k and v.
        mixed: whether these may be of several dtypes.
        rounds: whether results over a part of the keys are of the inputs' dtype, not fp32.
    """

    name: str
    on: Mapping[int, tuple[Ability, ...]]
    dtypes: tuple[torch.dtype, ...]
    repeats: Repeats
    package: Package | None = None
    mixed: bool = False
    rounds: bool = True


_SQUARE: Mapping[str, bool] = {"packed": False, "skewed": False, "softcap": False}
PLAIN = frozenset({RECTANGLE, CAUSAL, WINDOW})
DIAGONAL = frozenset({RECTANGLE, CAUSAL})
ANY_MASK = frozenset(CallKind)
UP_TO_128 = HeadWidths(8, 128)
ANY_WIDTH = HeadWidths(1, 1 << 20, 1, unequal=True)

BACKENDS = (
    Backend(
        "flash",
        {
            # Its backward with shared kv heads takes values of the keys' width only.
            9: (Ability(HeadWidths(8, 256, unshared=True), ANY_MASK, 650, repeats_interval=False),),
            10: (
                Ability(UP_TO_128, ANY_MASK, 1613, measured=True, repeats_interval=False),
                Ability(HeadWidths(256, 256), DIAGONAL, 1200, softcap=False),
                Ability(HeadWidths(192, 192, pairs=((192, 128),)), PLAIN, 1400),
            ),
            12: (Ability(HeadWidths(8, 128), PLAIN, 250, softcap=False),),
        },
        HALF,
        Repeats.ON_REQUEST,
        Package("flash-attn-4", "4.0.0b36", "4.1", "pip install 'dtcp[gpu]'"),
    ),
    Backend(
        "flash3",
        {9: (Ability(HeadWidths(8, 256), PLAIN, 680, measured=True),)},
        HALF,
        Repeats.ON_REQUEST,
        Package(
            "flash_attn_3",
            "3.0.0b1",
            "4",
            "build the hopper folder of Dao-AILab/flash-attention",
            "flash_attn_interface",
        ),
    ),
    Backend(
        "cudnn",
        {
            8: (Ability(HeadWidths(8, 128), DIAGONAL, 180, **_SQUARE),),
            9: (Ability(HeadWidths(8, 256), DIAGONAL, 600, **_SQUARE),),
            10: (Ability(HeadWidths(8, 128), DIAGONAL, 1240, measured=True, **_SQUARE),),
        },
        HALF,
        Repeats.NEVER,
    ),
    Backend(
        "ffpa",
        {
            9: (Ability(HeadWidths(320, 512, 64), DIAGONAL, 535, measured=True, softcap=False),),
            10: (Ability(HeadWidths(512, 512), DIAGONAL, 800, softcap=False),),
        },
        HALF,
        Repeats.NEVER,
        Package("ffpa-attn", "0.2.4", "0.3", "pip install 'dtcp[ffpa]'"),
    ),
    Backend(
        "flash2",
        {
            major: (Ability(HeadWidths(8, 256), PLAIN, speed, measured=speed in (200, 335)),)
            for major, speed in ((8, 200), (9, 335), (10, 340), (12, 240))
        },
        HALF,
        Repeats.ON_REQUEST,
        Package("flash-attn", "2.8", "3", "pip install flash-attn (it compiles, with nvcc)"),
    ),
    Backend(
        "aten_flash",
        {
            major: (Ability(HeadWidths(8, 256), PLAIN, speed, softcap=False),)
            for major, speed in ((8, 195), (9, 330), (10, 335), (12, 235))
        },
        HALF,
        Repeats.ON_REQUEST,
    ),
    Backend(
        "triton",
        {
            major: (Ability(HeadWidths(1, 512, 1, unequal=True), ANY_MASK, speed, bias=True),)
            for major, speed in ((0, 1), (8, 120), (9, 390), (10, 600), (12, 150))
        },
        (*HALF, torch.float32),
        Repeats.ALWAYS,
        Package("triton", "3", "4", "pip install triton", "triton"),
        rounds=False,
    ),
    Backend(
        "reference",
        # On every GPU, those to come included.
        {major: (Ability(ANY_WIDTH, ANY_MASK, 0, bias=True),) for major in range(100)},
        (*HALF, torch.float32, torch.float64),
        Repeats.ALWAYS,
        mixed=True,
        rounds=False,
    ),
)
"""The fastest first where an architecture has a number for both."""


def check_kernel_name(name: str) -> None:
    """Refuse a name that no backend has.

    Raises:
        ValueError: there is none.
    """
    if name != AUTO:
        backend_named(name)


def check_unrounded(name: str) -> None:
    """Refuse a name whose backend rounds what is summed further, in fp32.

    Raises:
        ValueError: it does, or there is none.
    """
    if name != AUTO and backend_named(name).rounds:
        unrounded = ", ".join(backend.name for backend in BACKENDS if not backend.rounds)
        raise ValueError(
            f"Ranks sum in fp32 what their kernel has not rounded, got reduce_dtype=torch.float32 "
            f"with kernel={name!r}: name one of {AUTO}, {unrounded}."
        )


def takes_heads(name: str, width: int, kind: CallKind) -> bool:
    """Whether a backend takes such calls with heads of this width on some device; AUTO any.

    Raises:
        ValueError: there is none of that name.
    """
    if name == AUTO:
        return True
    return any(
        kind in ability.kinds and ability.widths.take(width, width, group=1)
        for abilities in backend_named(name).on.values()
        for ability in abilities
    )


def backend_named(name: str) -> Backend:
    """The backend of a name.

    Raises:
        ValueError: there is none.
    """
    for backend in BACKENDS:
        if backend.name == name:
            return backend
    names = ", ".join(backend.name for backend in BACKENDS)
    raise ValueError(
        f"A kernel of attention is one of {AUTO}, {names}, got kernel={name!r}: name one of them, "
        f"or leave the choice to {AUTO}."
    )
