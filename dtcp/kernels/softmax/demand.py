"""What a call of attention asks of a backend, and why a backend does not do it, in words."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata, util

import torch
from torch.torch_version import TorchVersion

from dtcp.kernels.softmax.backends import Ability, Backend, Package, Repeats
from dtcp.kernels.softmax.calls import Call, CallKind
from dtcp.kernels.softmax.types import Keys, Queries, SoftmaxParams
from dtcp.kernels.triton_support import tile_width, triton_runs_on


@dataclass(frozen=True)
class Demand:
    """What is asked of a kernel, for all calls of one attention together.

    Args:
        arch: compute capability as one number, 90 for Hopper; 0 on other devices.
        dtypes: of q, k and v.
        group: query heads that share a kv head.
        triton: whether Triton's kernels run on these tensors.
        triton_width: what Triton's tiles must hold of a head, on this GPU.
        bias: what scores have of a bias by distance, by name.
        wide: whether results over a part of the keys or queries must be fp32.
    """

    device: torch.device
    arch: int
    dtypes: tuple[torch.dtype, ...]
    key_width: int
    value_width: int
    group: int
    kinds: frozenset[CallKind]
    packed: bool
    skewed: bool
    softcap: bool
    repeatable: bool
    triton: bool
    triton_width: int
    bias: frozenset[str] = frozenset()
    wide: bool = False

    def __str__(self) -> str:
        names = ", ".join(sorted(kind.value for kind in self.kinds)) or "nothing"
        dtypes = ", ".join(sorted({str(x).removeprefix("torch.") for x in self.dtypes}))
        packed = ", packed documents" if self.packed else ""
        packed += ", a score bias" if self.bias else ""
        packed += ", parts in float32" if self.wide else ""
        return f"{names}{packed}, heads of {self.widths}, {dtypes}, on {self.place}"

    @property
    def widths(self) -> str:
        same = self.key_width == self.value_width
        return f"{self.key_width}" if same else f"{self.key_width} / {self.value_width}"

    @property
    def place(self) -> str:
        return f"sm_{self.arch}" if self.arch else f"a {self.device.type}"


def demand_of(
    queries: Queries, keys: Keys, calls: Sequence[Call] | None, params: SoftmaxParams
) -> Demand:
    """What this attention asks; `calls` None for a mask that is no plain window."""
    q, (k, v) = queries.q, keys[:2]
    arch = 0
    if q.is_cuda:
        major, minor = torch.cuda.get_device_capability(q.device)
        arch = 10 * major + minor
    widest = max(q.shape[-1], v.shape[-1])
    return Demand(
        device=q.device,
        arch=arch,
        dtypes=(q.dtype, k.dtype, v.dtype),
        key_width=q.shape[-1],
        value_width=v.shape[-1],
        group=q.shape[2] // k.shape[2],
        kinds=frozenset((CallKind.INTERVAL,) if calls is None else (x.kind for x in calls)),
        packed=any(x.packed for x in calls or ()),
        skewed=any(x.skewed for x in calls or ()),
        softcap=params.softcap != 0.0,
        repeatable=torch.are_deterministic_algorithms_enabled(),
        triton=triton_runs_on(q),
        triton_width=tile_width(q, widest),
        bias=frozenset() if queries.bias is None else queries.bias.names,
        wide=params.wide,
    )


def ability_for(backend: Backend, demand: Demand) -> Ability | None:
    """What the backend does for heads of these widths on this device."""
    for ability in backend.on.get(demand.arch // 10, ()):
        if ability.widths.take(demand.key_width, demand.value_width, demand.group):
            return ability
    return None


def refusal(backend: Backend, demand: Demand) -> str | None:
    """Why the backend cannot do what is asked; None if it can."""
    return refusal_of_inputs(backend, demand) or _refusal_of_mask(backend, demand)


def is_able(backend: Backend, demand: Demand) -> bool:
    """Whether it could do what is asked, if it were installed."""
    return _incapable(backend, demand) is None and _refusal_of_mask(backend, demand) is None


def refusal_of_inputs(backend: Backend, demand: Demand) -> str | None:
    """Why it cannot take such tensors on this device, whatever the mask: the same on every rank."""
    return _incapable(backend, demand) or missing(backend.package)


def _incapable(backend: Backend, demand: Demand) -> str | None:
    abilities = backend.on.get(demand.arch // 10, ())
    ability = ability_for(backend, demand)
    dtypes = {str(x).removeprefix("torch.") for x in demand.dtypes}
    reason = None
    if not abilities:
        reason = f"does not run on {demand.place}"
    elif not set(demand.dtypes) <= set(backend.dtypes) or (len(dtypes) > 1 and not backend.mixed):
        takes = " or ".join(str(x).removeprefix("torch.") for x in backend.dtypes)
        reason = f"takes {takes}, got {', '.join(sorted(dtypes))}"
    elif ability is None:
        widths = "; ".join(str(each.widths) for each in abilities)
        reason = f"takes heads of {widths}, got {demand.widths}"
    elif demand.softcap and not ability.softcap:
        reason = "has no softcap"
    elif demand.bias and not ability.bias:
        reason = "has no score bias"
    elif demand.wide and backend.rounds:
        reason = "rounds the parts that are to be summed in float32"
    elif demand.repeatable and backend.repeats is Repeats.NEVER:
        reason = "does not repeat itself bit by bit, which torch was asked for"
    elif backend.name == "triton" and not demand.triton:
        reason = f"does not run {demand.dtypes[0]} on {demand.place} here"
    elif backend.name == "triton" and demand.triton_width > ability.widths.most:
        reason = "needs more shared memory for these heads than this GPU has"
    return reason


def _refusal_of_mask(backend: Backend, demand: Demand) -> str | None:
    """A reason in the mask, which may differ from rank to rank."""
    ability = ability_for(backend, demand)
    assert ability is not None
    reason = None
    if not demand.kinds <= ability.kinds:
        lacking = ", ".join(sorted(kind.value for kind in demand.kinds - ability.kinds))
        reason = f"does not do this mask ({lacking})"
    elif demand.packed and not ability.packed:
        reason = "does not take packed documents"
    elif demand.skewed and not ability.skewed:
        reason = "takes a diagonal only for as many queries as keys"
    elif demand.repeatable and CallKind.INTERVAL in demand.kinds and not ability.repeats_interval:
        reason = "does not repeat itself bit by bit under this mask, which torch was asked for"
    return reason


@cache
def missing(package: Package | None) -> str | None:
    """What is wrong with the package as it is installed, if anything, and what to do."""
    if package is None:
        return None
    installed = version_of(package)
    if installed is None:
        return f"needs {package.name}, which is not installed: {package.install}"
    # Pre-releases come before their release: those of `below` are not below it.
    if not package.least <= TorchVersion(installed) < f"{package.below}.dev0":
        return (
            f"is known to work with {package.name} from {package.least} to below {package.below}, "
            f"got {installed}: {package.install}"
        )
    return None


@cache
def version_of(package: Package) -> str | None:
    """The version that is installed; None without it."""
    names = (package.name, package.name.replace("_", "-"))
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    # A module built from its folder may have no distribution of a known name.
    return package.least if package.module and util.find_spec(package.module) else None
