"""Save a model of transformers as its own save_pretrained would, one parameter at a time."""

import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from dtcp.checkpoint.huggingface import INDEX
from dtcp.distributed.groups import rank_of_process
from dtcp.huggingface.quantized import check_no_quantized
from dtcp.huggingface.stages import weights_elsewhere
from dtcp.parallelize.hf_files import saved_groups
from dtcp.parallelize.plans.adapters import adapted_model
from dtcp.parallelize.tensor_parallel.huggingface_experts import join_gate_and_up
from dtcp.sequence.arguments import check_ints, check_kind

ONE_FILE = "model.safetensors"
SHARD_BYTES = 5 * 10**9
_WRITTEN = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
"""Names that are given here, and by transformers: files of another name are not ours to remove."""


@torch.no_grad()
def save_hf(
    model: Any,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    pp: DeviceMesh | None = None,
) -> None:
    """Write a model of parallelize_hf into a folder that from_pretrained reads: every rank calls.

    Names and shapes are those that the family was published with. Ranks put one parameter together
    at a time (several that are one weight in the files), and the first rank writes it. Of a
    PeftModel the adapters are written, as peft does it.

    Args:
        dtype: of floating-point weights in the files; None: as they are.
        shard_bytes: size at which another file begins.
        pp: the axis of pipeline stages; the model is then this rank's stage of it, or an
            nn.ModuleList of several. Weights of the other stages travel to the first rank.
    Raises:
        ValueError: a folder or a file that cannot be written, on all ranks; a stage without pp.
    """
    check_kind("save_hf", nn.Module, model=model)
    check_kind("save_hf", (str, Path), folder=folder)
    check_kind("save_hf", (torch.dtype, type(None)), dtype=dtype)
    check_ints("save_hf", least=1, shard_bytes=shard_bytes)
    if adapted_model(model) is model:
        check_no_quantized(
            "save_hf writes weights that are numbers",
            model,
            "save its adapters (of a PeftModel), for the rest is as it was loaded",
        )
    if pp is None and weights_elsewhere(model).weights:
        raise ValueError(
            f"A folder has the weights of all stages, got one of {type(model).__name__} and "
            f"pp=None: pass pp=mesh.pp, on the ranks of all stages."
        )
    writer = _Writer(Path(folder), shard_bytes) if rank_of_process() == 0 else None
    try:
        if writer is not None:
            writer.attempt(writer.prepare)
        if pp is not None:
            _save_stages(model, dtype, writer, pp)
        elif adapted_model(model) is not model:
            _save_adapters(model, dtype, writer)
        else:
            _save_weights(model, dtype, writer)
    finally:
        failed = [None if writer is None else writer.error]
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.broadcast_object_list(failed, src=0)
    if failed[0]:
        raise ValueError(
            f"A model is saved in a folder that the first rank can write, got {folder} "
            f"({failed[0]}): give it another one, or room."
        )


def _save_weights(model: Any, dtype: torch.dtype | None, writer: "_Writer | None") -> None:
    """Put one group of weights together after the other; only the first rank keeps any."""
    for make in _weights_of(model, dtype, keeps=writer is not None):
        if writer is not None:
            # What transformers makes of them is attempted, too: other ranks wait for this one.
            writer.attempt(lambda made=make: writer.add_all(made()))
    if writer is not None:
        writer.attempt(lambda: writer.finish(model, dtype))


def _weights_of(
    model: Any, dtype: torch.dtype | None, *, keeps: bool
) -> Iterator[Callable[[], dict[str, Tensor]]]:
    """Functions that make what files hold, of one group of whole weights after the other.

    Args:
        keeps: whether this rank is to call them; all ranks put weights together.
    """
    parameters = _saved(model)
    for group in saved_groups(model, list(parameters)):
        whole = {x: _whole(model, x, parameters[x], dtype, keeps=keeps) for x in group.names}
        yield partial(group.revert, model, whole)


def _save_stages(
    model: Any, dtype: torch.dtype | None, writer: "_Writer | None", pp: DeviceMesh
) -> None:
    """The weights of one stage after the other, which those of the first rank's pp send to it."""
    group, parts = pp.get_group(), list(model) if isinstance(model, nn.ModuleList) else [model]
    sends = 0 in dist.get_process_group_ranks(group)

    def arrived(parcel: Any, owner: int) -> Any:
        given = [parcel]
        if sends:
            dist.broadcast_object_list(given, group=group, group_src=owner)
        if writer is not None and given[0] is not None:
            writer.attempt(lambda: writer.add_made(given[0]))
        return given[0]

    for part, owner in itertools.product(parts, range(pp.size())):
        if owner == pp.get_local_rank():
            for make in _weights_of(part, dtype, keeps=sends):
                arrived(_made(make) if sends else None, owner)
            arrived(None, owner)
        while owner != pp.get_local_rank() and sends and arrived(None, owner) is not None:
            pass
    if writer is not None:
        writer.attempt(lambda: writer.finish(parts[0], dtype))


def _made(make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor] | str:
    """Weights for files, or what went wrong, which the first rank tells all."""
    try:
        return make()
    # Held back as in _Writer.attempt, for the same reason.
    except Exception as error:  # noqa: BLE001
        return f"{type(error).__name__}: {error}"


def _saved(model: Any) -> dict[str, Tensor]:
    """What a checkpoint holds, each weight once: of a shared one, the name that is not tied."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    state = model.state_dict(keep_vars=True)
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    first: dict[int, str] = {}
    for name in sorted(state, key=lambda name: name in tied):
        first.setdefault(id(state[name]), name)
    kept = set(first.values()) - ignored - weights_elsewhere(model).copies
    return {name: x for name, x in state.items() if name in kept}


def _whole(model: Any, name: str, x: Tensor, dtype: torch.dtype | None, *, keeps: bool) -> Tensor:
    whole = join_gate_and_up(model, name, x.full_tensor() if isinstance(x, DTensor) else x.detach())
    if not keeps:
        return whole.new_empty(0)
    cast = whole.to(dtype) if dtype is not None and whole.is_floating_point() else whole
    return cast.cpu().contiguous()


def _save_adapters(model: Any, dtype: torch.dtype | None, writer: "_Writer | None") -> None:
    """What peft saves of a model on one device: adapters, and embeddings that changed their size.

    The first rank says what that is: it may ask a folder or a hub that others do not reach.
    """
    state = model.state_dict(keep_vars=True)
    kept: list[set[str]] = [set()]
    if writer is not None:
        writer.attempt(lambda: kept[0].update(_names_of_adapters(model, state)))
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast_object_list(kept, src=0)
    base = adapted_model(model)
    inside = {id(x): name for name, x in base.state_dict(keep_vars=True).items()}
    whole = {
        name: _whole(base, inside[id(x)], x, dtype, keeps=writer is not None)
        for name, x in state.items()
        if name in kept[0]
    }
    if writer is not None:
        writer.attempt(lambda: model.save_pretrained(writer.folder, state_dict=whole))


def _names_of_adapters(model: Any, state: Mapping[str, Tensor]) -> set[str]:
    from peft import get_peft_model_state_dict

    own = {
        id(x)
        for adapter in model.peft_config
        for x in get_peft_model_state_dict(model, state, adapter_name=adapter).values()
    }
    return {name for name, x in state.items() if id(x) in own}


class _Writer:
    """Files of weights, written as they fill; the first error is kept, and ends the writing."""

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        self.folder, self.shard_bytes = folder, shard_bytes
        self.error = ""
        self.pending: dict[str, Tensor] = {}
        self.files: list[list[str]] = []
        self.total = 0

    def attempt(self, write: Any) -> None:
        """Do it, unless something failed before."""
        if self.error:
            return
        try:
            write()
        # Held back, never swallowed: every rank raises it at the end. This rank alone writes, and
        # the others wait for its part in gathering the next weight; disks, safetensors and torch
        # raise classes without a common base, and one left out would leave them waiting forever.
        except Exception as error:  # noqa: BLE001
            self.error = f"{type(error).__name__}: {error}"

    def prepare(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)

    def add_made(self, made: Mapping[str, Tensor] | str) -> None:
        """Add what another rank has made, or raise what it says went wrong."""
        if isinstance(made, str):
            raise RuntimeError(made)
        self.add_all(made)

    def add_all(self, weights: Mapping[str, Tensor]) -> None:
        for name, weight in weights.items():
            self.add(name, weight)

    def add(self, name: str, weight: Tensor) -> None:
        held = sum(x.nbytes for x in self.pending.values())
        if self.pending and held + weight.nbytes > self.shard_bytes:
            self._flush()
        self.pending[name] = weight
        self.total += weight.nbytes

    def finish(self, model: Any, dtype: torch.dtype | None) -> None:
        """Give files their names, which say how many there are, and write what goes with them."""
        self._flush()
        count = len(self.files)
        names = [f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)]
        names = [ONE_FILE] if count == 1 else names
        for path in list(self.folder.iterdir()):
            if _WRITTEN.fullmatch(path.name):
                path.unlink()
        for number, name in enumerate(names):
            self._part(number).rename(self.folder / name)
        index = self.folder / INDEX
        if count == 1:
            index.unlink(missing_ok=True)
        else:
            pairs = zip(self.files, names, strict=True)
            weight_map = {key: name for keys, name in pairs for key in keys}
            content = {"metadata": {"total_size": self.total}, "weight_map": weight_map}
            index.write_text(json.dumps(content, indent=2, sort_keys=True))
        _save_config(model, self.folder, dtype)

    def _part(self, number: int) -> Path:
        return self.folder / f"part-{number:05}.tmp"

    def _flush(self) -> None:
        save_file(self.pending, self._part(len(self.files)), metadata={"format": "pt"})
        self.files.append(list(self.pending))
        self.pending = {}


def _save_config(model: Any, folder: Path, dtype: torch.dtype | None) -> None:
    kinds = (kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))
    config = deepcopy(model.config)
    config.architectures = [next(kinds).__name__]
    config.dtype = str(dtype or model.dtype).removeprefix("torch.")
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
