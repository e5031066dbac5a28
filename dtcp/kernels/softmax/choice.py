"""Which backend computes a call of attention: the fastest that can, and why not a faster one.

A choice depends on a `Demand` alone. It is made once for each, and so is what is said of it.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import inf

import torch

from dtcp.kernels.softmax.backends import BACKENDS, Backend, backend_named
from dtcp.kernels.softmax.demand import Demand, ability_for, is_able, refusal, refusal_of_inputs
from dtcp.kernels.softmax.types import AUTO

LOG = logging.getLogger("dtcp.kernels")

SelfTest = Callable[[Backend, Demand], str | None]
"""What is wrong with the results of a backend on this device; None if they are right."""


@dataclass(frozen=True)
class KernelChoice:
    """The backend that computes what a demand asks for.

    Args:
        passed_over: name and reason of the backends that would have been faster.
        lost: how many times as fast the fastest of those is expected to be that could do it, were
            it installed and right; 0 for none, inf where plain torch computes instead.
    """

    backend: Backend
    demand: Demand
    passed_over: tuple[tuple[str, str], ...]
    lost: float

    def __str__(self) -> str:
        text = f"attention ({self.demand}) is computed by {self.backend.name}"
        if self.passed_over:
            reasons = "; ".join(f"{name} {reason}" for name, reason in self.passed_over)
            text += f"; faster ones passed over: {reasons}"
        if 2 <= self.lost < inf:
            text += f" (up to {self.lost:.1f} times as fast)"
        if self.is_slow:
            text += "; in plain torch, many times slower than by a kernel"
        return text

    @property
    def is_slow(self) -> bool:
        """Whether plain torch computes on a GPU what a kernel of some GPU would; none does fp64."""
        plain = self.backend.name == "reference"
        return plain and self.demand.arch > 0 and torch.float64 not in self.demand.dtypes


def choose_kernel(demand: Demand, name: str, self_test: SelfTest) -> KernelChoice:
    """The fastest backend that does what is asked, or the one that is named.

    A mask may be plain on one rank and not on another, so a named backend that cannot do the mask
    of a call leaves that call to the fastest that can, and says so; an error would stop one rank
    while others wait for it.

    Raises:
        ValueError: as of `check_takes`.
    """
    ranked = _ranked(demand)
    if name != AUTO:
        check_takes(demand, name)
        named = backend_named(name)
        ranked.remove(named)
        ranked.insert(0, named)
    passed_over: list[tuple[str, str]] = []
    fastest = 0
    for backend in ranked:
        reason = refusal(backend, demand) or self_test(backend, demand)
        speed = _speed(backend, demand)
        if reason is None:
            lost = fastest / speed if speed else inf if fastest else 0.0
            return KernelChoice(backend, demand, tuple(passed_over), lost)
        if speed or backend.name == name:
            passed_over.append((backend.name, reason))
            fastest = max(fastest, speed if is_able(backend, demand) else 0)
    raise AssertionError("the reference computes everything")


def check_takes(demand: Demand, name: str) -> None:
    """Refuse a named backend that cannot take such tensors: on every rank alike.

    Raises:
        ValueError: no backend has that name, or it cannot take such tensors on this device, or is
            not installed.
    """
    reason = refusal_of_inputs(backend_named(name), demand)
    if reason is not None:
        able = [each.name for each in _ranked(demand) if refusal(each, demand) is None]
        raise ValueError(
            f"Attention is computed by a kernel that can, got kernel={name!r}, which {reason}, "
            f"for {demand}: name one of {', '.join([AUTO, *able])}."
        )


def log_choice(choice: KernelChoice) -> None:
    """Say once what was chosen; louder where a kernel of twice the speed would be faster."""
    loud = choice.lost >= 2 or choice.is_slow
    LOG.log(logging.WARNING if loud else logging.INFO, "%s", choice)


@cache
def log_rounded_parts(name: str) -> None:
    """Say once what it costs to merge results which a backend rounds, if it does."""
    if backend_named(name).rounds:
        LOG.info(
            "A ring, and a mask of several intervals, merge results that %s has rounded to the "
            "inputs' dtype: up to 1.4 times the error of one call. AllGatherAttention makes one "
            "call an interval; with reduce_dtype=torch.float32 results are merged in fp32.",
            name,
        )


@cache
def log_rounded_sums(name: str) -> None:
    """Say once what it costs that ranks sum gradients which a backend rounds, if it does."""
    if backend_named(name).rounds:
        LOG.info(
            "Ranks sum gradients of keys, which %s has rounded to the inputs' dtype on each: 1.2 "
            "to 1.5 times the error of one device. With reduce_dtype=torch.float32 none is "
            "rounded, on slower kernels; UlyssesAttention on no more ranks than kv heads sums "
            "none.",
            name,
        )


def _ranked(demand: Demand) -> list[Backend]:
    """All backends, the fastest first."""
    return sorted(BACKENDS, key=lambda backend: -_speed(backend, demand))


def _speed(backend: Backend, demand: Demand) -> int:
    """Expected TFLOP/s on this device; 0 where it has nothing for it."""
    ability = ability_for(backend, demand)
    return 0 if ability is None else ability.speed
